"""Answers of a shape, through the real server on the demo model, which knows no JSON."""

import json
import re
import time
from pathlib import Path

import openai
import pydantic
import pytest

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["fairy", "king"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "who", "strict": True, "schema": SCHEMA}}
CHAT = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 200, "temperature": 0}
BOMB = {"type": "string", "allOf": [{"pattern": f"(.*a){{{i}}}"} for i in range(20)]}


class Who(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    kind: str = pydantic.Field(pattern="^(fairy|king)$")
    friends: list[int] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def server(start_server):
    command = ["-m", "tokenry", "serve", "demo", "--backend", "cpu", "--port", "0"]
    server = start_server([*command, "--kv-cache-bytes", "64MiB"]).wait_ready()
    yield server
    assert server.close() == 0


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
        yield client


def chat(server, **body):
    return server.http.post("/v1/chat/completions", json={**CHAT, **body})


def check(text):
    who = json.loads(text)
    assert set(who) == {"name", "age", "kind"}
    assert len(who["name"]) <= 12
    assert 0 <= who["age"] <= 99
    assert who["kind"] in ("fairy", "king")


def test_a_schema_binds_every_choice_and_their_stream(server, client):
    body = {"response_format": FORMAT, "temperature": 1, "seed": 5, "n": 3, "logprobs": True}
    answer = chat(server, **body).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        check(choice["message"]["content"])
        assert len(choice["logprobs"]["content"]) >= 5
    assert len(set(texts)) > 1
    streamed = [""] * 3
    for chunk in client.chat.completions.create(model="demo", stream=True, **CHAT | body):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts  # same seed


def test_parse_gives_a_pydantic_model(client):
    for seed in (1, 2):
        parsed = client.chat.completions.parse(
            model="demo",
            messages=CHAT["messages"],
            response_format=Who,
            max_tokens=200,
            seed=seed,
        )
        who = parsed.choices[0].message.parsed
        assert isinstance(who, Who)
        assert who.kind in ("fairy", "king")


def test_parse_gives_a_pydantic_model_from_a_stream(client):
    with client.chat.completions.stream(
        model="demo", messages=CHAT["messages"], response_format=Who, max_tokens=200, seed=3
    ) as stream:
        events = [event.type for event in stream]
        who = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(who, Who)
    assert "content.delta" in events


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("guided_regex", "[a-z]{2,4}-[0-9]{2}", "[a-z]{2,4}-[0-9]{2}"),
        ("guided_choice", ["a king", "a fairy"], "a king|a fairy"),
        ("guided_grammar", 'root ::= "the " ("cat" | "dog")', "the (cat|dog)"),
        ("guided_grammar", 'start: "the " ANIMAL\nANIMAL: "cat" | "dog"', "the (cat|dog)"),
        ("guided_json", {"type": "integer", "minimum": 1, "maximum": 9}, "[1-9]"),
        ("guided_json", '{"const": true}', "true"),
        ("structured_outputs", {"regex": "(ab|ba){3}"}, "(ab|ba){3}"),
        ("structured_outputs", {"choice": ["x"]}, "x"),
        ("structured_outputs", {"json": {"enum": [1, 2]}, "disable_any_whitespace": True}, "1|2"),
    ],
)
def test_shapes_of_completions_and_chats(server, field, value, pattern):
    asked = {"prompt": "Once upon a time", "max_tokens": 60, field: value}
    texts = [server.http.post("/v1/completions", json=asked).json()["choices"][0]["text"]]
    texts.append(chat(server, **{field: value}).json()["choices"][0]["message"]["content"])
    for text in texts:
        assert re.fullmatch(pattern, text), text


def test_json_object_begins_an_object(server):
    answer = chat(server, response_format={"type": "json_object"}, max_tokens=30).json()
    assert answer["choices"][0]["message"]["content"].lstrip().startswith("{")


def test_a_shape_keeps_to_stop_strings_min_tokens_and_ignore_eos(server):
    digits = {"guided_regex": "[0-9]{1,30}", "max_tokens": 60, "logit_bias": {"4": 100}}
    short = chat(server, **digits).json()["choices"][0]["message"]["content"]
    assert re.fullmatch("[0-9]{1,30}", short)
    longer = chat(server, **digits, min_tokens=9).json()
    assert longer["usage"]["completion_tokens"] >= 9
    assert re.fullmatch("[0-9]{1,30}", longer["choices"][0]["message"]["content"])
    least = chat(server, guided_choice=["yes"], min_tokens=50, ignore_eos=True).json()
    assert least["choices"][0]["message"]["content"] == "yes"  # nothing could follow
    stopped = chat(server, guided_regex="abc{20}", stop="cc").json()["choices"][0]
    assert (stopped["message"]["content"], stopped["stop_reason"]) == ("ab", "cc")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
            "response_format",
        ),
        ({"guided_json": {"not": {"type": "string"}}}, "guided_json"),
        ({"guided_json": '{"type": '}, "guided_json"),
        ({"guided_json": {"a": [[["b"] * 3] * 3]} | {"type": 3}}, "guided_json"),
        ({"guided_regex": "a("}, "guided_regex"),
        ({"guided_regex": "(?=a)b"}, "guided_regex"),
        ({"guided_regex": "a" * 20000}, "guided_regex"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"guided_grammar": "hello"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"guided_choice": ["é"], "allowed_token_ids": [300]}, None),
    ],
)
def test_what_is_no_shape_is_a_400_that_names_it(server, body, param, stream):
    response = chat(server, **body, stream=stream)
    if stream and param is None:
        assert '"error"' in response.text  # found while it is answered
        return
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_grammar_bomb_is_a_400_in_bounded_time_and_nobody_waits_for_it(server):
    import threading

    answers = []

    def explode():
        answers.append(chat(server, guided_json=BOMB))

    bomb = threading.Thread(target=explode)
    begun = time.monotonic()
    bomb.start()
    plain = [chat(server, max_tokens=4).status_code for _ in range(3)]
    bound = chat(server, guided_regex="[xyz]{3}").status_code
    assert (plain, bound) == ([200] * 3, 200)
    assert bomb.is_alive()  # it is still being tried
    bomb.join(60)
    assert time.monotonic() - begun < 30
    assert answers[0].status_code == 400
    assert answers[0].json()["error"]["param"] == "guided_json"
    assert "longer than" in answers[0].json()["error"]["message"]
    again = time.monotonic()
    assert chat(server, guided_json=BOMB).status_code == 400
    assert time.monotonic() - again < 3  # it is known to be one


def test_books_agree_afterwards(server):
    assert server.http.get("/health/integrity").json() == {"ok": True}


def test_the_guides_example_runs(server, capsys):
    page = Path(__file__).parents[2] / "docs" / "structured-output.md"
    example = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)[0]
    exec(example.replace("http://localhost:8000", server.url), {"__name__": "example"})
    assert "age=" in capsys.readouterr().out
