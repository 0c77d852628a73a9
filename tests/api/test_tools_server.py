"""Tool calls and thinking through the real server, read by the official client: the demo model
knows neither, so grammars make it call and think.
"""

import json

import openai
import pydantic
import pytest

TEMPLATE = """{{ bos_token }}{% if tools %}<|system|>
{% for tool in tools %}{{ tool | tojson }}{% endfor %}
Answer with <tool_call>{...}</tool_call>.<|end|>{% endif %}{% for m in messages %}<|{{
m.role }}|>{{ m.content }}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{%
endif %}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{%
endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{%
if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Oslo", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CHAT = {
    "messages": [{"role": "user", "content": "Weather?"}],
    "max_tokens": 200,
    "temperature": 0,
    "model": "demo",
}
SERVE = ["-m", "tokenry", "serve", "demo", "--backend", "cpu", "--port", "0"]
SERVE += ["--kv-cache-bytes", "64MiB"]


@pytest.fixture(scope="module")
def plain(start_server):
    """The demo model as it is: its template knows of no tools."""
    server = start_server(SERVE).wait_ready()
    yield server
    assert server.close() == 0


@pytest.fixture(scope="module")
def hermes(start_server, tmp_path_factory):
    """With a template that has tools and thinking."""
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(TEMPLATE)
    server = start_server([*SERVE, "--chat-template", str(file)]).wait_ready()
    yield server
    assert server.close() == 0


@pytest.fixture(params=["plain", "hermes"])
def server(request):
    return request.getfixturevalue(request.param)


def post(server, **body):
    return server.http.post("/v1/chat/completions", json={**CHAT, **body})


def client_of(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)


def check_call(call):
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "get_weather"
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["city"] in ("Oslo", "Rome")
    assert 1 <= arguments["days"] <= 9


@pytest.mark.parametrize(("choice", "finish"), [("required", "tool_calls"), (NAMED, "stop")])
def test_a_call_that_must_come_comes(server, choice, finish):
    body = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    answer = post(server, **body).json()["choices"][0]
    assert answer["finish_reason"] == finish
    assert answer["message"]["content"] is None
    assert len(answer["message"]["tool_calls"]) == 1
    check_call(answer["message"]["tool_calls"][0])


def test_a_streamed_call_is_put_together_by_the_client(server):
    body = {"tools": [WEATHER, ADD], "tool_choice": NAMED}
    whole = post(server, **body).json()["choices"][0]["message"]["tool_calls"][0]
    with client_of(server) as client:
        chunks = list(client.chat.completions.create(**CHAT, **body, stream=True, n=2))
    for index in (0, 1):
        choices = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        deltas = [call for c in choices for call in c.delta.tool_calls or ()]
        first, rest = deltas[0], deltas[1:]
        assert (first.index, first.type, first.function.arguments) == (0, "function", "")
        assert first.function.name == "get_weather"
        assert first.id
        assert rest and all(
            (d.index, d.id, d.type, d.function.name) == (0, None, None, None) for d in rest
        )
        arguments = "".join(d.function.arguments for d in rest)
        assert arguments == whole["function"]["arguments"]
        assert [c.finish_reason for c in choices if c.finish_reason] == ["stop"]
        assert [c.delta.role for c in choices if c.delta.role] == ["assistant"]


def test_parallel_calls_are_numbered(hermes):
    body = {"tools": [WEATHER], "tool_choice": "required", "temperature": 1.0, "n": 8, "seed": 1}
    body |= {"chat_template_kwargs": {"enable_thinking": False}, "logit_bias": {"4": -100}}
    numbers = set()
    answer = post(hermes, **body).json()
    for choice in answer["choices"]:
        calls = choice["message"]["tool_calls"]
        numbers.add(len(calls))
        assert len({call["id"] for call in calls}) == len(calls)
        for call in calls[:-1]:  # the last one may be cut by max_tokens
            check_call(call)
    assert max(numbers) > 1
    streamed = {}
    with client_of(hermes) as client:
        extra = {"chat_template_kwargs": body.pop("chat_template_kwargs")}
        for chunk in client.chat.completions.create(**CHAT | body, stream=True, extra_body=extra):
            for choice in chunk.choices:
                for call in choice.delta.tool_calls or ():
                    calls = streamed.setdefault(choice.index, [])
                    if call.id:
                        assert call.index == len(calls)
                        calls.append("")
                    calls[call.index] += call.function.arguments
    expected = {
        c["index"]: [call["function"]["arguments"] for call in c["message"]["tool_calls"]]
        for c in answer["choices"]
    }
    assert streamed == expected


class GetWeather(pydantic.BaseModel):
    """Weather of a city."""

    city: str = pydantic.Field(pattern="^(Oslo|Rome)$")


def test_the_clients_helper_parses_arguments(hermes):
    tools = [openai.pydantic_function_tool(GetWeather)]
    with client_of(hermes) as client:
        asked = {**CHAT, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
        whole = client.chat.completions.parse(**asked)
        with client.chat.completions.stream(**asked) as stream:
            streamed = stream.get_final_completion()
    for completion in (whole, streamed):
        function = completion.choices[0].message.tool_calls[0].function
        assert isinstance(function.parsed_arguments, GetWeather)


def test_the_model_may_answer_with_text_where_it_may_choose(server):
    plain = post(server, max_tokens=12).json()["choices"][0]
    assert plain["message"]["content"]
    assert "tool_calls" not in plain["message"]
    free = post(server, tools=[WEATHER], max_tokens=12).json()["choices"][0]
    assert free["message"]["content"]
    assert free["finish_reason"] in ("length", "stop")
    none = post(server, tools=[WEATHER], tool_choice="none", max_tokens=12).json()["choices"][0]
    assert none["message"]["content"] == plain["message"]["content"]  # the tools are not shown


def test_a_conversation_with_calls_is_rendered(server):
    calls = [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Oslo", "days": 2}'},
        }
    ]
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning": "Hm."},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
    ]
    answer = post(server, messages=messages, tools=[WEATHER], max_tokens=5)
    assert answer.status_code == 200, answer.text
    told = server.http.post("/tokenize", json={"messages": messages, "tools": [WEATHER]}).json()
    text = server.http.post("/detokenize", json={"tokens": told["tokens"]}).json()
    for part in ("Oslo", "Rain.", "get_weather", "Weather of a city."):
        assert part in json.dumps(text), text


SCHEMA = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}
SHAPED = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {**SCHEMA, "additionalProperties": False}},
    }
}


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_comes_before_an_answer_of_a_shape(hermes, stream):
    """The model is pushed to `<` at first, and so into thinking, which has to end at last."""
    ids = hermes.http.post("/tokenize", json={"prompt": "<", "add_special_tokens": False}).json()
    body = {**SHAPED, "logit_bias": {str(ids["tokens"][0]): 12}, "max_tokens": 300}
    if not stream:
        answer = post(hermes, **body).json()
        message, usage = answer["choices"][0]["message"], answer["usage"]
    else:
        message = {"content": "", "reasoning": "", "reasoning_content": ""}
        options = {"include_usage": True}
        with client_of(hermes) as client:
            for chunk in client.chat.completions.create(
                **CHAT | body, stream=True, stream_options=options
            ):
                usage = chunk.usage and chunk.usage.model_dump()
                for choice in chunk.choices:
                    delta = choice.delta.model_dump()
                    for name in message:
                        message[name] += delta.get(name) or ""
    assert message["reasoning"] == message["reasoning_content"] != ""
    counted = usage["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < counted <= usage["completion_tokens"]
    if message["content"]:
        assert json.loads(message["content"])["x"] in (1, 2)


def test_thinking_can_be_switched_off(hermes):
    for body in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
    ):
        message = post(hermes, **SHAPED, **body).json()["choices"][0]["message"]
        assert "reasoning" not in message
        assert json.loads(message["content"])["x"] in (1, 2)


def test_strict_tools_and_a_shape_bind_an_answer_that_may_be_either(hermes):
    strict = json.loads(json.dumps(WEATHER))
    strict["function"]["strict"] = True
    message = post(hermes, tools=[strict], **SHAPED).json()["choices"][0]["message"]
    if message.get("tool_calls"):
        check_call(message["tool_calls"][0])
    elif message["content"]:
        assert json.loads(message["content"])["x"] in (1, 2)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"function": {"name": "a", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
        ),
        (
            {
                "tools": [
                    {
                        "function": {
                            "name": "a",
                            "parameters": {"properties": {"x": {"type": "strange"}}},
                        }
                    }
                ],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"functions": [{"name": "a"}]}, "functions"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_wrong_tools_are_a_400_that_names_the_field(server, body, param):
    response = post(server, **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_tools_are_for_chats(plain):
    response = plain.http.post("/v1/completions", json={"prompt": "x", "tools": [WEATHER]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


def test_books_agree_afterwards(server):
    assert server.http.get("/health/integrity").json() == {"ok": True}


def test_capabilities_tell_how_the_model_calls_and_thinks(plain, hermes):
    told = [s.http.get("/v1/capabilities").json()["models"][0] for s in (plain, hermes)]
    assert [(m["tool_parser"], m["reasoning_parser"]) for m in told] == [
        ("json", None),
        ("hermes", "think"),
    ]
    assert "response_format" in told[0]["endpoints"]["/v1/chat/completions"]["fields"]
