"""Sampling extras, beam search, best_of, echo and the model's defaults, over HTTP."""

import json

import pytest

from tokenry.params import Watermark
from tokenry.watermark import detect

PROMPT = "Once upon a time there was a little"
BODY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
SERVE = ["-m", "tokenry", "serve", "demo", "--backend", "cpu", "--port", "0"]
SERVE += ["--kv-cache-bytes", "64MiB", "--max-model-len", "512"]


@pytest.fixture(scope="module")
def demo(start_server):
    server = start_server(SERVE).wait_ready()
    yield server
    assert server.close() == 0


@pytest.fixture(scope="module")
def marking(start_server, tmp_path_factory):
    """A server with the makers' sampling defaults and a mark on every answer."""
    path = tmp_path_factory.mktemp("makers")
    values = {"temperature": 1e-6, "top_k": 50, "top_p": 0.9, "max_new_tokens": 150}
    (path / "generation_config.json").write_text(json.dumps({**values, "eos_token_id": 4}))
    more = ["--generation-config", str(path), "--watermark", "kgw", "--watermark-key", "9"]
    server = start_server([*SERVE, *more, "--watermark-delta", "4"]).wait_ready()
    yield server
    assert server.close() == 0


def complete(server, **change):
    response = server.http.post("/v1/completions", json={**BODY, **change})
    assert response.status_code == 200, response.text
    assert "x-ignored-params" not in response.headers
    return response.json()


def texts(server, **change):
    return [choice["text"] for choice in complete(server, **change)["choices"]]


@pytest.mark.parametrize(
    "fields",
    [
        {"typical_p": 0.4},
        {"top_n_sigma": 0.5},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"mirostat": 2, "mirostat_tau": 0.3, "mirostat_eta": 1.0},
        {"dry_multiplier": 50.0, "dry_allowed_length": 1, "dry_sequence_breakers": []},
        {"no_repeat_ngram_size": 1},
        {"repeat_penalty": 3.0},
        {"watermark": {"scheme": "kgw", "key": 3, "delta": 20.0}},
        {"watermark": {"scheme": "gumbel", "key": 3}},
        {"watermark": True},
    ],
    ids=str,
)
def test_each_extra_changes_the_answer_and_is_repeatable(demo, fields):
    asked = {"temperature": 1.0, "seed": 11, "max_tokens": 60}
    changed = texts(demo, **asked, **fields)
    assert changed != texts(demo, **asked)
    assert changed == texts(demo, **asked, **fields)
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, **fields}
    assert demo.http.post("/v1/chat/completions", json=chat).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"typical_p": 0}, "typical_p"),
        ({"typical_p": "much"}, "typical_p"),
        ({"top_n_sigma": -2}, "top_n_sigma"),
        ({"xtc_probability": 1.5}, "xtc_probability"),
        ({"mirostat": 1}, "mirostat"),
        ({"dry_base": 0.5}, "dry_base"),
        ({"dry_allowed_length": 0}, "dry_allowed_length"),
        ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers"),
        ({"dry_sequence_breakers": "{"}, "dry_sequence_breakers"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n"),
        ({"dry_penalty_last_n": 64, "dry_range": 32}, "dry_penalty_last_n"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"watermark": {"scheme": "secret"}}, "watermark.scheme"),
        ({"watermark": {"scheme": "kgw", "gama": 0.5}}, "watermark"),
        ({"watermark": {"scheme": "kgw", "gamma": 1.5}}, "watermark.gamma"),
        ({"watermark": "yes"}, "watermark"),
        ({"watermark": {"scheme": "gumbel"}}, "watermark"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"use_beam_search": True, "n": 3, "temperature": 0.7}, "temperature"),
        ({"use_beam_search": True, "n": 3, "top_p": 0.7}, "top_p"),
        ({"use_beam_search": True, "n": 3, "stop": "."}, "stop"),
        ({"use_beam_search": True, "beam_width": 2, "n": 3}, "n"),
        ({"use_beam_search": True, "echo": True, "logprobs": 1}, "prompt_logprobs"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"suffix": "the end"}, "suffix"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_a_400_that_names_the_field(demo, fields, param):
    response = demo.http.post("/v1/completions", json={**BODY, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_best_of_is_for_completions_alone(demo):
    chat = {"messages": [{"role": "user", "content": "x"}], "best_of": 2}
    error = demo.http.post("/v1/chat/completions", json=chat).json()["error"]
    assert error["param"] == "best_of"


def test_best_of_gives_the_likeliest_of_those_that_were_made(demo):
    asked = {"temperature": 1.0, "seed": 5, "max_tokens": 10}
    every = complete(demo, **asked, n=4, logprobs=0)["choices"]
    mean = {
        c["text"]: sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["tokens"])
        for c in every
    }
    want = sorted(mean, key=mean.get, reverse=True)
    answer = complete(demo, **asked, n=2, best_of=4)
    assert [c["text"] for c in answer["choices"]] == want[:2]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in every)


def test_beam_search_answers_are_sorted_and_likelier_than_greedy(demo):
    body = {"use_beam_search": True, "n": 4, "logprobs": 2, "temperature": None}
    choices = complete(demo, **body)["choices"]
    sums = [sum(c["logprobs"]["token_logprobs"]) for c in choices]
    assert sums == sorted(sums, reverse=True)
    assert len({c["text"] for c in choices}) == 4
    greedy = complete(demo, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"]
    assert sums[0] >= sum(greedy) - 1e-4
    assert texts(demo, best_of=4, use_beam_search=True) == [choices[0]["text"]]
    assert texts(demo, beam_width=4, n=2) == [c["text"] for c in choices[:2]]
    streamed = demo.http.post("/v1/completions", json={**BODY, "beam_width": 4, "stream": True})
    lines = [x for x in streamed.text.splitlines() if x.startswith("data: {")]
    assert "".join(json.loads(x[6:])["choices"][0]["text"] for x in lines) == choices[0]["text"]
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "n": 2}
    answer = demo.http.post("/v1/chat/completions", json={**chat, "use_beam_search": True}).json()
    assert len(answer["choices"]) == 2


def test_echo_in_a_stream_scores_the_prompt_for_every_choice(demo):
    asked = {"echo": True, "logprobs": 1, "n": 2, "max_tokens": 3}
    whole = complete(demo, **asked)["choices"]
    response = demo.http.post("/v1/completions", json={**BODY, **asked, "stream": True})
    tables = {0: [], 1: []}
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            (choice,) = json.loads(line[6:])["choices"]
            tables[choice["index"]] += choice["logprobs"]["token_logprobs"]
    for choice in whole:
        assert tables[choice["index"]] == choice["logprobs"]["token_logprobs"]
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert None not in choice["logprobs"]["token_logprobs"][1:]
    assert whole[0]["text"].startswith(PROMPT)


def test_the_makers_defaults_are_told_and_used_and_a_request_overrides_them(demo, marking):
    assert any("generation_config.json sets temperature 1e-06" in x for x in marking.lines)
    assert not any("generation_config.json sets" in x for x in demo.lines)
    unset = {**BODY, "max_tokens": 30}
    del unset["temperature"]
    twice = [marking.http.post("/v1/completions", json=unset).json() for _ in range(2)]
    assert twice[0]["choices"][0]["text"] == twice[1]["choices"][0]["text"]
    hot = {**unset, "temperature": 1.5, "top_p": 1.0, "top_k": 0}
    warm = {
        marking.http.post("/v1/completions", json=hot).json()["choices"][0]["text"] for _ in "ab"
    }
    assert len(warm) == 2
    chat = {"messages": [{"role": "user", "content": PROMPT}], "ignore_eos": True}
    answer = marking.http.post("/v1/chat/completions", json=chat).json()
    assert answer["usage"]["completion_tokens"] == 150
    capped = marking.http.post(
        "/v1/completions", json={**unset, "max_tokens": 200, "ignore_eos": True}
    )
    assert capped.json()["usage"]["completion_tokens"] == 150


def test_tgis_routes_have_tgis_defaults_and_not_the_makers(marking):
    (greedy,) = texts(marking, temperature=0, max_tokens=30)

    def generated(path, **parameters):
        body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 30, **parameters}}
        response = marking.http.post(path, json=body)
        assert response.status_code == 200, response.text
        if path == "/generate_stream":
            last = [x for x in response.text.splitlines() if x.startswith("data:")][-1]
            return json.loads(last[5:])["generated_text"]
        answer = response.json()
        return (answer[0] if path == "/" else answer)["generated_text"]

    for path in ("/generate", "/generate_stream", "/"):
        assert generated(path) == greedy
        drawn = {generated(path, do_sample=True, seed=seed) for seed in (1, 2)}
        assert len(drawn) == 2, "drawn with temperature 1e-6, not TGI's 1"


def test_a_marking_server_marks_every_answer(marking, demo):
    mark = Watermark(scheme="kgw", key=9, delta=4.0)
    assert any("every answer carries a kgw watermark" in line for line in marking.lines)
    asked = {"max_tokens": 140, "temperature": 1.0, "seed": 3, "ignore_eos": True, "top_k": 0}
    for server, marked in ((marking, True), (demo, False)):
        (text,) = texts(server, **asked, top_p=1.0)
        ids = server.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert (detect(ids, mark).p_value < 1e-4) == marked
    error = marking.http.post("/v1/completions", json={**BODY, "watermark": {"scheme": "kgw"}})
    assert error.json()["error"]["param"] == "watermark"
    assert texts(marking, **asked, watermark=True) == texts(marking, **asked)


def test_books_agree_afterwards(demo):
    assert demo.http.get("/health/integrity").json() == {"ok": True}
