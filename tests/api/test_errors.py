"""Every wrong request is answered in OpenAI's shape, and names the field."""

import asyncio
import json

import pytest

from tokenry.api.middleware import Faults

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
TEXT = {"model": "demo", "prompt": "Once", "max_tokens": 3}


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"presence_penalty": 5}, "presence_penalty"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"tools": []}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"priority": 2**70}, "priority"),
        ({"priority": 3}, "priority"),
        ({"logits_processor": "x"}, "logits_processor"),
        ({"extra_args": {"a": 1}}, "extra_args"),
        ({"bad_words_ids": [[5]]}, "bad_words_ids"),
        ({"detokenize": False}, "detokenize"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"seed": 2**70}, "seed"),
        ({"user": 3}, "user"),
        ({"metadata": "x"}, "metadata"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
        ),
    ],
    ids=str,
)
def test_wrong_chat_field_is_named(toy, change, param):
    error = error_of(toy.http.post("/v1/chat/completions", json={**CHAT, **change}), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt[1]"),
        ({"prompt": [999999]}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 1024, "n": 128}, "n"),
    ],
    ids=str,
)
def test_wrong_completion_field_is_named(toy, change, param):
    assert (
        error_of(toy.http.post("/v1/completions", json={**TEXT, **change}), 400)["param"] == param
    )


def test_missing_prompt_is_named(toy):
    assert error_of(toy.http.post("/v1/completions", json={}), 400)["param"] == "prompt"


def test_unknown_model_is_404(toy):
    error = error_of(toy.http.post("/v1/completions", json={**TEXT, "model": "gpt"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_too_long_prompt_says_the_limit(toy):
    error = error_of(toy.http.post("/v1/completions", json={**TEXT, "prompt": [5] * 600}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "This model's maximum context length is 512 tokens" in error["message"]


def test_answer_that_was_asked_for_must_fit_and_one_that_was_not_is_cut(toy):
    long = {"model": "demo", "prompt": [5] * 505}
    error = error_of(toy.http.post("/v1/completions", json={**long, "max_tokens": 8}), 400)
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert "This model's maximum context length is 512 tokens" in error["message"]
    for body in ({**long, "max_tokens": 7}, long):
        usage = toy.http.post("/v1/completions", json=body).json()["usage"]
        assert usage["completion_tokens"] == 7


def test_prompt_of_the_whole_context_is_scored_where_no_answer_is_asked_for(toy):
    body = {"prompt": [5] * 512, "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = toy.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"][0]["logprobs"]["token_logprobs"]) == 512
    assert answer.json()["usage"]["completion_tokens"] == 0
    error_of(toy.http.post("/v1/completions", json={**body, "prompt": [5] * 513}), 400)
    error_of(toy.http.post("/v1/completions", json={**body, "max_tokens": 1}), 400)


def test_metrics_have_our_names_and_those_of_existing_dashboards(toy):
    toy.http.post("/v1/completions", json=TEXT)
    lines = toy.http.get("/metrics").text.splitlines()
    told = {line.partition("{")[0] for line in lines if not line.startswith("#")}
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
        *("prompt_tokens_total", "generation_tokens_total", "num_preemptions_total"),
        *("prefix_cache_queries_total", "prefix_cache_hits_total", "request_success_total"),
        *("time_to_first_token_seconds_count", "inter_token_latency_seconds_count"),
        "e2e_request_latency_seconds_count",
    ):
        assert {f"tokenry:{name}", f"vllm:{name}"} <= told


def test_transport_errors_have_openais_shape(toy):
    error_of(toy.http.get("/nowhere"), 404)
    error_of(toy.http.get("/v1/completions"), 405)
    error_of(toy.http.post("/v1/completions", content=b"x"), 415)
    headers = {"content-type": "application/json; charset=utf-8"}
    error_of(toy.http.post("/v1/completions", content=b"{", headers=headers), 400)
    error_of(toy.http.post("/v1/completions", content=b"[1]", headers=headers), 400)
    deep = b"[" * 100_000
    assert (
        "deeply"
        in error_of(toy.http.post("/v1/completions", content=deep, headers=headers), 400)["message"]
    )


def test_fault_of_ours_is_told_and_nothing_is_raised_to_the_transport():
    sent = []

    async def broken(scope, receive, send):
        raise ZeroDivisionError

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/"}
    asyncio.run(Faults(broken)(scope, None, send))
    assert sent[0]["status"] == 500
    assert "ZeroDivisionError" in json.loads(sent[1]["body"])["error"]["message"]


def test_assistant_without_content_is_accepted(toy):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    response = toy.http.post("/v1/chat/completions", json={**CHAT, "messages": messages})
    assert response.status_code == 200


def test_unknown_field_is_named_in_a_header(toy):
    response = toy.http.post("/v1/completions", json={**TEXT, "shoe_size": 44, "user": "me"})
    assert response.status_code == 200
    assert response.headers["x-ignored-params"] == "shoe_size"


def test_unknown_field_of_the_tokenizer_is_named_in_a_header(toy):
    asked = {"prompt": "Once", "shoe_size": 44}
    response = toy.http.post("/tokenize", json=asked)
    assert response.status_code == 200
    assert response.headers["x-ignored-params"] == "shoe_size"
    asked = {"tokens": response.json()["tokens"], "hat": 7}
    assert toy.http.post("/detokenize", json=asked).headers["x-ignored-params"] == "hat"


def test_neutral_values_ask_for_nothing(toy):
    neutral = {"detokenize": True, "priority": 0, "logits_processor": None, "bad_words_ids": []}
    response = toy.http.post("/v1/completions", json={**TEXT, **neutral})
    assert response.status_code == 200
    assert "x-ignored-params" not in response.headers


def test_fields_inside_of_objects_are_told_too(toy):
    asked = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 2,
        "response_format": {"type": "text", "json_schema": {"colour": 1}, "hat": 1},
        "stream_options": {"include_usage": True, "shoe_size": 1},
    }
    told = "response_format.hat,response_format.json_schema.colour,stream_options.shoe_size"
    response = toy.http.post("/v1/chat/completions", json={**asked, "stream": True})
    found = response.headers.get("x-ignored-params", "").split(",")
    assert sorted(found) == told.split(",")


def test_a_message_without_content_is_named(toy):
    for message in ({"role": "user"}, {"role": "system", "content": None}):
        messages = [{"role": "user", "content": "x"}, message]
        response = toy.http.post("/v1/chat/completions", json={"messages": messages})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages[1].content"


def test_keys_size_and_strictness(start_toy):
    server = start_toy({"api_key": ["s3cret"], "max_body_bytes": 200, "strict_params": True})
    server.wait_ready()
    error = error_of(server.http.post("/v1/completions", json=TEXT), 401)
    assert error["code"] == "invalid_api_key"
    error_of(server.http.get("/v1/models"), 401)
    server.http.headers["authorization"] = "Bearer s3cret"
    assert server.http.get("/v1/models").status_code == 200
    error_of(server.http.post("/v1/completions", json={**TEXT, "prompt": "x" * 300}), 413)
    error = error_of(server.http.post("/v1/completions", json={**TEXT, "shoe_size": 44}), 400)
    assert error["param"] == "shoe_size"
    inside = {**TEXT, "stream": True, "stream_options": {"hat": 1}}
    error = error_of(server.http.post("/v1/completions", json=inside), 400)
    assert error["param"] == "stream_options.hat"
    for path, asked in (("/tokenize", {"prompt": "Once"}), ("/detokenize", {"tokens": [5]})):
        error = error_of(server.http.post(path, json={**asked, "shoe_size": 44}), 400)
        assert error["param"] == "shoe_size"
    assert server.close() == 0
