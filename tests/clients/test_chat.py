"""C9-C14, C16-C22: answers of a chat, whole and streamed."""

import json
import math
import re

import anthropic
import anyio
import httpx2
import openai
import pytest

ASKED = {"model": "demo", "messages": [{"role": "user", "content": "Tell me a story."}]}


def test_c09_openai_a_chat_has_all_of_openais_fields(http, openai_client):
    answer = http.post("/v1/chat/completions", json={**ASKED, "max_tokens": 4}).json()
    assert re.match(r"chatcmpl-\w+", answer["id"])
    assert answer["object"] == "chat.completion"
    assert type(answer["created"]) is int
    assert answer["model"] == "demo"
    assert answer["system_fingerprint"]
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["message"]["refusal"] is None
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0
    parsed = openai_client.chat.completions.create(**ASKED, max_tokens=4)
    assert parsed.usage.completion_tokens == 4


def test_c10_openai_the_finish_reason_is_one_of_openais(openai_client):
    cut = openai_client.chat.completions.create(**ASKED, max_tokens=3, temperature=0)
    assert cut.choices[0].finish_reason == "length"
    text = openai_client.chat.completions.create(**ASKED, max_tokens=20, temperature=0)
    stop = text.choices[0].message.content[5:9]
    stopped = openai_client.chat.completions.create(
        **ASKED, max_tokens=20, temperature=0, stop=[stop]
    )
    assert stopped.choices[0].finish_reason == "stop"


def test_c11_openai_contents_are_strings_or_parts_and_every_role_is_known(openai_client):
    parts = [{"type": "text", "text": "Tell me a story."}]
    whole = openai_client.chat.completions.create(**ASKED, max_tokens=6, temperature=0)
    same = openai_client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": parts}], max_tokens=6, temperature=0
    )
    assert same.choices[0].message.content == whole.choices[0].message.content
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    every = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "user", "content": "And now?"},
    ]
    assert openai_client.chat.completions.create(model="demo", messages=every, max_tokens=2)
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    with pytest.raises(openai.BadRequestError) as raised:
        openai_client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": image}]
        )
    assert raised.value.param.startswith("messages[0].content")


def test_c12_openai_limits_and_n(openai_client):
    new = openai_client.chat.completions.create(**ASKED, max_completion_tokens=5)
    assert new.usage.completion_tokens == 5
    two = openai_client.chat.completions.create(**ASKED, n=2, temperature=0, max_tokens=5)
    texts = [choice.message.content for choice in two.choices]
    assert texts[0] == texts[1]
    assert two.usage.completion_tokens == 10
    assert two.usage.prompt_tokens == new.usage.prompt_tokens


def test_c13_openai_stops_seeds_and_biases(openai_client):
    asked = {**ASKED, "max_tokens": 20, "seed": 11}
    first = openai_client.chat.completions.create(**asked)
    again = openai_client.chat.completions.create(**asked)
    text = first.choices[0].message.content
    assert again.choices[0].message.content == text
    assert again.system_fingerprint == first.system_fingerprint
    stops = ["%%", "@@", "##", text[7:10]]
    stopped = openai_client.chat.completions.create(**asked, stop=stops)
    assert stopped.choices[0].message.content == text[: text.index(text[7:10])]
    ids = openai_client.post("/../tokenize", cast_to=dict, body={"prompt": " the"})["tokens"]
    forced = openai_client.chat.completions.create(
        **{**asked, "max_tokens": 3}, logit_bias={str(ids[0]): 100}
    )
    assert forced.choices[0].message.content == " the" * 3
    banned = openai_client.chat.completions.create(**asked, logit_bias={str(ids[0]): -100})
    assert " the " not in banned.choices[0].message.content


def test_c14_openai_logprobs_are_finite_and_match_their_tokens(openai_client):
    answer = openai_client.chat.completions.create(
        **ASKED, max_tokens=6, logprobs=True, top_logprobs=20
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        assert math.isfinite(entry.logprob)
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
        assert len(entry.top_logprobs) == 20
        ranked = [top.logprob for top in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
    allowed = {"allowed_token_ids": [300, 301], "logprobs": True, "top_logprobs": 5}
    raw = openai_client.post(
        "/chat/completions", cast_to=httpx2.Response, body={**ASKED, "max_tokens": 2, **allowed}
    )
    assert "Infinity" not in raw.text
    assert "NaN" not in raw.text


def test_c16_http_a_stream_is_framed_as_server_sent_events(http):
    asked = {**ASKED, "max_tokens": 4, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"
        text = answer.read().decode()
    events = [event for event in text.split("\n\n") if event and not event.startswith(":")]
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        assert json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_c17_openai_the_role_comes_once_per_choice_in_order(openai_client):
    stream = openai_client.chat.completions.create(**ASKED, n=3, max_tokens=4, stream=True)
    roles, first = [], {}
    for chunk in stream:
        for choice in chunk.choices:
            first.setdefault(choice.index, choice.delta.role)
            roles += [choice.index] if choice.delta.role else []
    assert roles == [0, 1, 2]
    assert first == {0: "assistant", 1: "assistant", 2: "assistant"}


def test_c19_openai_one_end_per_choice_and_usage_last(openai_client):
    asked = {**ASKED, "n": 2, "max_tokens": 4, "stream": True}
    chunks = list(
        openai_client.chat.completions.create(**asked, stream_options={"include_usage": True})
    )
    ends = [c.index for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert sorted(ends) == [0, 1]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])
    without = list(openai_client.chat.completions.create(**asked))
    assert all(chunk.choices for chunk in without)
    with (
        openai_client.chat.completions.stream(
            **ASKED, max_tokens=4, stream_options={"include_usage": True}
        ) as helper,
        pytest.raises(openai.LengthFinishReasonError),
    ):
        helper.until_done().get_final_completion()


def test_c20_openai_deltas_join_to_the_whole_text(openai_client):
    asked = {**ASKED, "max_tokens": 40, "seed": 4, "temperature": 1.9}
    whole = openai_client.chat.completions.create(**asked).choices[0].message.content
    deltas = [
        chunk.choices[0].delta.content or ""
        for chunk in openai_client.chat.completions.create(**asked, stream=True)
    ]
    assert "".join(deltas) == whole
    stop = whole[10:14]
    cut = whole[: whole.index(stop)]
    stream = openai_client.chat.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == cut


def test_c21_openai_an_engine_that_dies_ends_the_stream_with_an_error(start_server, kill_engine):
    server = start_server().wait_ready()
    asked = {**ASKED, "max_tokens": 1900, "stream": True, "extra_body": {"ignore_eos": True}}
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(**asked)
        next(iter(stream))
        kill_engine(server)
        with pytest.raises(openai.APIError) as raised:
            for _ in stream:
                pass
    assert "engine" in str(raised.value)
    server.close()


def test_c21_anthropic_an_engine_that_dies_ends_every_dialect(start_server, kill_engine):
    server = start_server().wait_ready()
    asked = {"model": "demo", "messages": ASKED["messages"], "max_tokens": 1900}
    with (
        anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as claude,
        openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        endless = {"ignore_eos": True}
        message = claude.messages.create(**asked, stream=True, extra_body=endless)
        response = client.responses.create(
            model="demo", input="A story.", stream=True, extra_body=endless
        )
        begun = [next(iter(message)), next(iter(response))]
        assert [event.type for event in begun] == ["message_start", "response.created"]
        kill_engine(server)
        with pytest.raises(anthropic.APIStatusError) as raised:
            for _ in message:
                pass
        assert "engine" in str(raised.value)
        *_, last = response
        assert last.type == "response.failed"
        assert last.response.error.code == "engine_dead"
    server.close()


def running(http):
    text = http.get("/metrics").text
    return sum(
        float(re.search(rf"^tokenry:{name}{{.*}} (\S+)$", text, re.M)[1])
        for name in ("num_requests_running", "num_requests_waiting")
    )


def test_c22_http_a_client_that_goes_leaves_nothing_behind(http, url):
    """1,000 opened and dropped: after their heads, in the middle of a stream, in the queue."""

    async def drop(client, i):
        asked = {**ASKED, "max_tokens": 1500, "stream": i % 2 == 0, "ignore_eos": True}
        try:
            async with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
                async for _ in answer.aiter_bytes():
                    return
        except httpx2.ReadTimeout:
            return

    async def all_of_them():
        limits = httpx2.Limits(max_connections=50)
        timeout = httpx2.Timeout(60, read=0.2)
        async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=timeout) as client:
            for start in range(0, 1000, 50):
                async with anyio.create_task_group() as group:
                    for i in range(start, start + 50):
                        group.start_soon(drop, client, i)

    anyio.run(all_of_them)
    for _ in range(100):
        if running(http) == 0:
            break
        anyio.run(anyio.sleep, 0.1)
    assert running(http) == 0
    assert http.get("/health/integrity").json() == {"ok": True}
    usage = re.search(r"^tokenry:kv_cache_usage_perc{.*} (\S+)$", http.get("/metrics").text, re.M)
    assert float(usage[1]) == 0
