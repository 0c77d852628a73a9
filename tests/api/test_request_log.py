"""One line per request in the server's log; its prompt only where the operator asked for it."""

import json

import pytest

BODY = {"prompt": "Once upon", "max_tokens": 5, "temperature": 0, "request_id": "tale"}


def told(server, name):
    """The line of the request, as data."""
    (line,) = (line for line in server.end() if name in line and "tokenry.requests" in line)
    return json.loads(line[line.index("{") :])


def test_a_line_tells_counts_end_and_times_but_not_the_prompt(start_toy):
    server = start_toy().wait_ready()
    answer = server.http.post("/v1/completions", json=BODY)
    line = told(server, "cmpl-tale-0")
    assert line["request"] == "cmpl-tale-0"
    assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert (line["output_tokens"], line["finish_reason"]) == (5, "length")
    assert 0 < line["ttft_s"] <= line["total_s"]
    assert "prompt" not in line


@pytest.mark.parametrize("prompt", ["Once upon", [300, 301]], ids=["text", "ids"])
def test_prompts_are_told_where_asked_for_also_of_streams(start_toy, prompt):
    server = start_toy({"log_prompts": True}).wait_ready()
    server.http.post("/v1/completions", json={**BODY, "prompt": prompt, "stream": True, "n": 2})
    line = told(server, "cmpl-tale-0")
    assert line["prompt"] == prompt
    assert line["output_tokens"] == 10


def test_failed_request_is_told_with_its_reason_and_refused_ones_are_not(start_toy):
    server = start_toy(TOY_MAX_TOP_K="5").wait_ready()
    assert server.http.post("/v1/completions", json={**BODY, "top_k": 6}).status_code == 400
    assert server.http.post("/v1/completions", json={**BODY, "top_k": -9}).status_code == 400
    assert told(server, "cmpl-tale-0")["finish_reason"] == "error"


def test_higher_level_tells_no_requests(start_toy):
    server = start_toy({"log_level": "warning"}).wait_ready()
    assert server.http.post("/v1/completions", json=BODY).status_code == 200
    assert not [line for line in server.end() if "tokenry.requests" in line]
