"""Tool calls and thoughts of a chat, told again as Anthropic's blocks and as OpenAI's items."""

import asyncio
import json

import pytest

from tokenry.api.inner import Telling
from tokenry.api.messages_api import _Message
from tokenry.api.messages_body import MessagesRequest, chat_body
from tokenry.api.responses_body import ResponsesRequest, input_items, renamed
from tokenry.api.responses_body import chat_body as responses_chat_body
from tokenry.api.responses_events import Teller
from tokenry.api.responses_store import MAX_BYTES, Record, ResponseStore
from tokenry.errors import RequestError

USAGE = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}


def chunk(finish=None, usage=None, **delta):
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {"choices": [choice], "usage": usage}


def call(index, text, name=None):
    function = {"arguments": text, **({"name": name} if name else {})}
    more = {"id": f"call_{index}", "type": "function"} if name else {}
    return {"index": index, **more, "function": function}


CHUNKS = [
    chunk(role="assistant", content=""),
    chunk(reasoning_content="Rain"),
    chunk(reasoning_content="?"),
    chunk(content="I "),
    chunk(content="look."),
    chunk(tool_calls=[call(0, "", "weather")]),
    chunk(tool_calls=[call(0, '{"city":')]),
    chunk(tool_calls=[call(0, ' "Ulm"}')]),
    chunk(tool_calls=[call(1, "", "time")]),
    chunk(tool_calls=[call(1, "{}")]),
    chunk(finish="tool_calls"),
    {"choices": [], "usage": USAGE},
]


async def stream():
    for one in CHUNKS:
        yield one


async def collect(events):
    return [event async for event in events]


def test_anthropics_events_have_a_block_per_thought_text_and_call():
    events = asyncio.run(collect(_Message("m").events(stream())))
    starts = [e for e in events if e["type"] == "content_block_start"]
    assert [e["content_block"]["type"] for e in starts] == [
        "thinking", "text", "tool_use", "tool_use",
    ]  # fmt: skip
    assert [e["index"] for e in starts] == [0, 1, 2, 3]
    assert starts[2]["content_block"] == {
        "type": "tool_use", "id": "call_0", "name": "weather", "input": {},
    }  # fmt: skip
    pieces = [e["delta"] for e in events if e["type"] == "content_block_delta" and e["index"] == 2]
    assert json.loads("".join(p["partial_json"] for p in pieces)) == {"city": "Ulm"}
    stops = [e["index"] for e in events if e["type"] == "content_block_stop"]
    assert stops == [0, 1, 2, 3]
    end = events[-2]
    assert end["delta"]["stop_reason"] == "tool_use"
    assert end["usage"]["output_tokens"] == 7
    assert events[-1] == {"type": "message_stop"}


def test_a_whole_answer_is_the_same_blocks():
    message = {
        "content": None,
        "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    }
    answer = {"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": USAGE}
    told = _Message("m").whole(answer)
    assert told["content"] == [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}]
    assert told["stop_reason"] == "tool_use"


def test_responses_events_open_and_close_an_item_per_thought_text_and_call():
    teller = Teller(ResponsesRequest(input="x"), "m")
    events = teller.begin()
    for one in CHUNKS:
        events += teller.take(teller.telling.take(one))
    events += teller.end()
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    opened = [e for e in events if e["type"] == "response.output_item.added"]
    closed = [e for e in events if e["type"] == "response.output_item.done"]
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [e["item"]["type"] for e in opened] == kinds
    assert (
        [e["output_index"] for e in opened] == [e["output_index"] for e in closed] == [0, 1, 2, 3]
    )
    arguments = [e for e in events if e["type"] == "response.function_call_arguments.done"]
    assert [e["arguments"] for e in arguments] == ['{"city": "Ulm"}', "{}"]
    output = teller.response["output"]
    assert output[0]["content"][0]["text"] == "Rain?"
    assert output[1]["content"][0]["text"] == "I look."
    assert (output[2]["name"], output[2]["call_id"]) == ("weather", "call_0")
    assert teller.response["status"] == "completed"
    assert teller.response["usage"]["output_tokens"] == 7


def test_anthropics_tools_and_results_become_the_chats():
    wanted = MessagesRequest(
        model="m",
        max_tokens=5,
        system=[{"type": "text", "text": "Be kind."}],
        tools=[{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        messages=[
            {"role": "user", "content": "Hello"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c", "content": "42"},
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
    )
    body = chat_body(wanted)
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "tool", "user"]
    (made,) = body["messages"][2]["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert body["messages"][3] == {"role": "tool", "tool_call_id": "c", "content": "42"}
    assert body["tools"][0]["function"]["parameters"] == {"type": "object"}
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert body["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "king", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "tool_result"}]}, "tool_use_id"),
    ],
)
def test_anthropics_messages_are_named_by_their_own_places(message, param):
    with pytest.raises(RequestError) as raised:
        chat_body(MessagesRequest(model="m", messages=[message]))
    assert param in raised.value.param


def test_items_of_calls_join_the_assistants_message():
    wanted = ResponsesRequest(
        input=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
            {"type": "function_call", "call_id": "b", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "42"},
        ],
        instructions="Be kind.",
        text={"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}},
    )
    body = responses_chat_body(wanted, "m", input_items(wanted), stream=False)
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "tool"]
    assert [c["id"] for c in body["messages"][2]["tool_calls"]] == ["a", "b"]
    schema = {"name": "n", "schema": {}, "strict": True}
    assert body["response_format"] == {"type": "json_schema", "json_schema": schema}


def test_the_chats_errors_bear_our_names():
    error = renamed(RequestError("max_tokens must be at least 1.", param="max_tokens"))
    assert (error.param, error.message) == (
        "max_output_tokens",
        "max_output_tokens must be at least 1.",
    )


def record(name, previous=None, size=0):
    response = {
        "id": name,
        "status": "completed",
        "output": [{"type": "message", "text": f"out {name}" + "x" * size}],
        "previous_response_id": previous,
    }
    return Record(response=response, items=[{"type": "message", "text": f"in {name}"}])


def test_the_store_keeps_the_newest_and_what_is_used():
    store = ResponseStore(2)
    for name in "ab":
        store.put(record(name))
    store.get("a")
    store.put(record("c"))
    assert len(store) == 2
    assert store.get("a")
    with pytest.raises(RequestError) as raised:
        store.get("b")
    assert raised.value.status == 404


def test_the_store_is_bounded_in_bytes():
    store = ResponseStore(1000)
    for name in "abcde":
        store.put(record(name, size=MAX_BYTES // 3))
    assert len(store) == 2
    store.delete("e")
    store.put(record("f"))
    assert len(store) == 2


def test_a_conversation_is_all_of_its_responses_or_none():
    store = ResponseStore(10)
    store.put(record("a"))
    store.put(record("b", previous="a"))
    texts = [item["text"] for item in store.conversation("b")]
    assert texts == ["in a", "out a", "in b", "out b"]
    store.delete("a")
    with pytest.raises(RequestError) as raised:
        store.conversation("b")
    assert raised.value.param == "previous_response_id"


def test_a_stream_that_says_nothing_shows_life():
    async def silent():
        yield None
        for one in CHUNKS:
            yield one

    async def first():
        return await anext(Telling().pieces(silent()))

    assert asyncio.run(first()) is None
