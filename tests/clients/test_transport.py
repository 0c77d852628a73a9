"""C1-C8: how requests come in, and how errors go out."""

import re

import httpx2
import openai
import pytest

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
JSON = {"content-type": "application/json"}


def check_error(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    for name in ("param", "code"):
        assert error[name] is None or isinstance(error[name], str)
    return error


def test_c01_http_every_error_is_openais_object(http):
    with_charset = {"content-type": "application/json; charset=utf-8"}
    assert http.post("/v1/chat/completions", json=CHAT, headers=with_charset).status_code == 200
    text = {"content-type": "text/plain"}
    check_error(http.post("/v1/chat/completions", content="{}", headers=text), 415)
    error = check_error(http.post("/v1/chat/completions", content="{", headers=JSON), 400)
    assert error["type"] == "invalid_request_error"
    big = b'{"prompt": "' + b"x" * (33 << 20) + b'"}'
    check_error(http.post("/v1/completions", content=big, headers=JSON), 413)
    check_error(http.get("/v1/nothing"), 404)
    check_error(http.get("/v1/chat/completions"), 405)
    check_error(http.delete("/v1/models"), 405)


def test_c02_openai_without_the_key_is_a_401_on_every_path(start_server):
    server = start_server("--api-key", "secret").wait_ready()
    paths = [p for p in http_paths(server) if not p.startswith("/admin")]
    assert len(paths) > 15
    for path in paths:
        error = server.http.post(path, json={}).json()
        assert server.http.post(path, json={}).status_code == 401, path
        if not path.startswith(("/v1/messages", "/generate", "/chat_tokenize")) and path != "/":
            assert error["error"]["code"] == "invalid_api_key", path
    assert server.http.options("/v1/chat/completions").status_code != 401
    wrong = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with openai.OpenAI(base_url=server.url + "/v1", api_key="secret") as right:
        assert right.chat.completions.create(**CHAT).choices
    as_anthropic = server.http.post(
        "/v1/chat/completions", json=CHAT, headers={"x-api-key": "secret"}
    )
    assert as_anthropic.status_code == 200
    assert server.close() == 0


def http_paths(server):
    """Every path that takes a POST and no name, from the document that the server gives itself."""
    key = {"authorization": "Bearer secret"}
    paths = server.http.get("/openapi.json", headers=key).json()["paths"]
    return [path for path, verbs in paths.items() if "post" in verbs and "{" not in path]


def test_c03_openai_unknown_model_is_a_404(openai_client):
    with pytest.raises(openai.NotFoundError) as raised:
        openai_client.chat.completions.create(**{**CHAT, "model": "nope"})
    body = raised.value.body
    assert (body["type"], body["param"]) == ("invalid_request_error", "model")
    assert body["code"] == "model_not_found"


def test_c04_openai_too_long_is_a_400_and_the_next_request_is_served(openai_client, http):
    with pytest.raises(openai.BadRequestError) as raised:
        openai_client.completions.create(model="demo", prompt="king " * 5000)
    assert raised.value.code == "context_length_exceeded"
    assert re.search(r"This model's maximum context length is \d+ tokens", str(raised.value))
    assert http.get("/health/integrity").json() == {"ok": True}
    assert openai_client.chat.completions.create(**CHAT).choices


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": []}, "tools"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": "many"}, "max_tokens"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_c05_openai_a_wrong_field_is_named(openai_client, change, param):
    with pytest.raises(openai.BadRequestError) as raised:
        openai_client.post("/chat/completions", cast_to=dict, body={**CHAT, **change})
    assert raised.value.param == param


def test_c06_openai_overload_is_a_503_that_says_when_to_come_back(start_server):
    server = start_server("--max-num-seqs", "1", "--max-queue", "3").wait_ready()
    # four long answers, one after the other: the server is full until the stream is closed
    long = {**CHAT, "n": 4, "max_tokens": 1900, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/chat/completions", json=long) as busy:
        lines = busy.iter_lines()
        next(lines)
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        with client, pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(**CHAT)
    assert raised.value.status_code == 503
    assert int(raised.value.response.headers["retry-after"]) >= 1
    assert int(raised.value.response.headers["retry-after-ms"]) >= 1000
    assert server.close() == 0


def test_c06_openai_a_keys_share_is_a_429(start_server, tmp_path):
    import subprocess
    import sys

    keys = tmp_path / "keys.json"
    command = [sys.executable, "-m", "tokenry", "keys", "add", "slow", "--file", str(keys)]
    done = subprocess.run(
        [*command, "--requests-per-minute", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    key = re.search(r"tk-\S+|sk-\S+", done.stdout)[0]
    server = start_server("--api-keys-file", str(keys)).wait_ready()
    with openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0) as client:
        client.chat.completions.create(**CHAT)
        with pytest.raises(openai.RateLimitError) as raised:
            client.chat.completions.create(**CHAT)
    assert int(raised.value.response.headers["retry-after"]) >= 1
    assert server.close() == 0


def test_c07_openai_every_answer_has_a_request_id(openai_client, http):
    answer = openai_client.chat.completions.create(**CHAT)
    assert answer._request_id
    for path in ("/v1/models", "/nothing", "/readyz"):
        assert http.get(path).headers["x-request-id"]
    named = http.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    assert int(named.headers["openai-processing-ms"]) >= 0


def test_c08_openai_models_are_listed_and_found_by_ids_with_slashes(start_server):
    server = start_server("--served-model-name", "owner/demo").wait_ready()
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any") as client:
        (model,) = client.models.list().data
        assert (model.id, model.object) == ("owner/demo", "model")
        assert isinstance(model.created, int)
        assert client.models.retrieve("owner/demo").id == "owner/demo"
    for path in ("/v1/models/owner/demo", "/v1/models/owner%2Fdemo"):
        assert httpx2.get(server.url + path).json()["id"] == "owner/demo"
    assert server.close() == 0
