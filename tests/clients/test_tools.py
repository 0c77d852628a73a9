"""C15, C18, C27, C28: thinking, tool calls, and answers of a shape. The demo model knows none of
them: grammars bind it.
"""

import json

import anthropic
import openai
import pydantic
import pytest

USER = [{"role": "user", "content": "Weather?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": CITY},
}
TIME = {"type": "function", "function": {"name": "time", "parameters": CITY}}
ASKED = {"model": "demo", "messages": USER, "max_tokens": 200, "temperature": 0}


class Who(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    age: int = pydantic.Field(ge=0, le=99)


def test_c15_http_the_thought_has_both_names_or_none(http):
    asked = {**ASKED, "max_tokens": 4}
    message = http.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]
    assert ("reasoning" in message) == ("reasoning_content" in message)
    assert message.get("reasoning") == message.get("reasoning_content")


def test_c18_openai_a_calls_deltas_accumulate(openai_client):
    asked = {**ASKED, "tools": [WEATHER], "tool_choice": "required"}
    asked["parallel_tool_calls"] = False  # the demo model would call until it is cut
    whole = openai_client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    calls = {}
    for chunk in openai_client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            for part in choice.delta.tool_calls or []:
                if part.index in calls:
                    assert part.id is None
                    assert part.function.name is None
                else:
                    assert part.id
                    assert part.type == "function"
                    calls[part.index] = [part.function.name, ""]
                calls[part.index][1] += part.function.arguments or ""
    assert sorted(calls) == list(range(len(calls)))
    made = [[c.function.name, c.function.arguments] for c in whole.message.tool_calls]
    assert [calls[i] for i in sorted(calls)] == made
    with openai_client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "weather"


def test_c27_openai_answers_have_the_shape_that_was_asked_for(openai_client):
    parsed = openai_client.chat.completions.parse(**ASKED, response_format=Who)
    assert isinstance(parsed.choices[0].message.parsed, Who)
    plain = openai_client.chat.completions.create(
        **{**ASKED, "max_tokens": 400, "seed": 3}, response_format={"type": "json_object"}
    )
    if plain.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(plain.choices[0].message.content), dict)
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    with pytest.raises(openai.BadRequestError):
        openai_client.chat.completions.create(**ASKED, response_format=wrong)


def test_c28_openai_the_choice_of_tools_is_kept(openai_client):
    create = openai_client.chat.completions.create
    tools = {"tools": [WEATHER, TIME]}
    none = create(**{**ASKED, "max_tokens": 8}, **tools, tool_choice="none").choices[0]
    assert none.message.tool_calls is None
    named = {"type": "function", "function": {"name": "time"}}
    one = create(**ASKED, **tools, tool_choice=named).choices[0]
    assert [call.function.name for call in one.message.tool_calls] == ["time"]
    assert one.finish_reason == "stop"
    single = create(**ASKED, **tools, tool_choice="required", parallel_tool_calls=False)
    (call,) = single.choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"city"}
    unknown = {"type": "function", "function": {"name": "nothing"}}
    with pytest.raises(openai.BadRequestError):
        create(**ASKED, **tools, tool_choice=unknown)


def test_c28_openai_a_response_calls_a_tool_and_gets_its_result(openai_client):
    tool = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
    asked = {"model": "demo", "tools": [tool], "temperature": 0}
    with openai_client.responses.stream(
        input="Weather?", tool_choice="required", parallel_tool_calls=False, **asked
    ) as stream:
        names = [event.type for event in stream]
        first = stream.get_final_response()
    assert "response.function_call_arguments.delta" in names
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = openai_client.responses.create(
        input=[result], previous_response_id=first.id, max_output_tokens=4, tool_choice="none",
        **asked,
    )  # fmt: skip
    assert second.output_text
    parsed = openai_client.responses.parse(
        model="demo", input="Who?", text_format=Who, max_output_tokens=300
    )
    assert isinstance(parsed.output_parsed, Who)


def test_c28_anthropic_a_message_uses_a_tool_and_gets_its_result(url):
    tool = {"name": "weather", "description": "of a city", "input_schema": CITY}
    single = {"type": "any", "disable_parallel_tool_use": True}
    asked = {"model": "demo", "max_tokens": 200, "tools": [tool]}
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as claude:
        whole = claude.messages.create(messages=USER, tool_choice=single, **asked)
        (use,) = [block for block in whole.content if block.type == "tool_use"]
        assert whole.stop_reason == "tool_use"
        assert use.input["city"] in ("Oslo", "Rome")
        with claude.messages.stream(messages=USER, tool_choice=single, **asked) as stream:
            streamed = stream.get_final_message()
        (again,) = [block for block in streamed.content if block.type == "tool_use"]
        assert again.name == "weather"
        assert set(again.input) == {"city"}
        result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain"}
        answer = {"role": "assistant", "content": [block.model_dump() for block in whole.content]}
        after = claude.messages.create(
            messages=[*USER, answer, {"role": "user", "content": [result]}],
            tool_choice={"type": "none"},
            **{**asked, "max_tokens": 4},
        )
        assert after.content[0].text
        counted = claude.messages.count_tokens(model="demo", messages=USER, tools=[tool])
        assert counted.input_tokens > 0


def test_c28_litellm_a_call(url):
    import litellm

    answer = litellm.completion(
        model="openai/demo", api_base=f"{url}/v1", api_key="none", tools=[WEATHER],
        tool_choice="required", messages=USER, max_tokens=200,
    )  # fmt: skip
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def test_c28_langchain_bound_tools_and_structured_output(url):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        model="demo", base_url=f"{url}/v1", api_key="none", max_tokens=200, temperature=0
    )
    answer = chat.bind_tools([WEATHER], tool_choice="required").invoke("Weather?")
    assert answer.tool_calls[0]["name"] == "weather"
    assert answer.tool_calls[0]["args"]["city"] in ("Oslo", "Rome")
    assert isinstance(chat.with_structured_output(Who).invoke("Who?"), Who)
