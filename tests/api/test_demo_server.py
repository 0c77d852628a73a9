"""`tokenry serve demo` as a user starts it: the real model, through the real command."""

import subprocess
import sys

import openai
import pytest

BODY = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def demo(start_server):
    command = ["-m", "tokenry", "serve", "demo", "--backend", "cpu", "--port", "0"]
    server = start_server([*command, "--kv-cache-bytes", "64MiB"]).wait_ready()
    yield server
    assert server.close() == 0


def test_greedy_story_is_the_same_alone_streamed_and_in_a_batch(demo):
    alone = demo.http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]
    assert alone.strip()
    prompts = [BODY["prompt"]] * 3 + ["The king"]
    batch = demo.http.post("/v1/completions", json={**BODY, "prompt": prompts}).json()
    assert [choice["text"] for choice in batch["choices"][:3]] == [alone] * 3
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="x") as client:
        chunks = client.completions.create(**BODY, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == alone


def test_chosen_logprob_is_exactly_the_greatest_when_greedy(demo):
    body = {**BODY, "echo": True, "logprobs": 2}
    table = demo.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert table["token_logprobs"][0] is None
    for logprob, top in list(zip(table["token_logprobs"], table["top_logprobs"], strict=True))[
        -24:
    ]:
        assert logprob == max(top.values())


def test_chat_answers(demo):
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 16}
    answer = demo.http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] <= 16


def test_books_agree_afterwards(demo):
    assert demo.http.get("/health/integrity").json() == {"ok": True}


def test_prompt_that_fits_no_step_is_a_400(start_server):
    command = ["-m", "tokenry", "serve", "demo", "--backend", "cpu", "--port", "0"]
    command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "128"]
    server = start_server([*command, "--kv-cache-bytes", "64MiB"]).wait_ready()
    response = server.http.post("/v1/completions", json={"prompt": [300] * 200, "max_tokens": 3})
    chat = {"messages": [{"role": "user", "content": "king " * 200}], "max_tokens": 3}
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "prompt")
    assert error["code"] == "context_length_exceeded"
    response = server.http.post("/v1/chat/completions", json=chat)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
    response = server.http.post("/v1/completions", json={"prompt": [300] * 100, "max_tokens": 3})
    assert response.json()["usage"]["completion_tokens"] == 3
    assert server.close() == 0


def test_generate_prints_prompt_and_continuation():
    command = [sys.executable, "-m", "tokenry", "generate", "demo", "Once upon", "--backend", "cpu"]
    command += ["--max-tokens", "8", "--temperature", "0", "--kv-cache-bytes", "64MiB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon")
    assert len(done.stdout) > len("Once upon\n")
