"""C23-C26, C29, C32: completions, evaluations' scoring, tokens, honesty, health."""

import openai
import pytest

ASKED = {"model": "demo", "max_tokens": 6, "temperature": 0}


def test_c23_openai_prompts_in_all_forms_and_their_choices(openai_client):
    create = openai_client.completions.create
    ids = openai_client.post("/../tokenize", cast_to=dict, body={"prompt": "Once"})["tokens"]
    alone = create(prompt="Once", **ASKED).choices[0].text
    assert create(prompt=ids, **ASKED).choices[0].text == alone
    many = create(prompt=["Once", "The king"], n=2, **ASKED)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text == alone
    lists = create(prompt=[ids, ids], **ASKED)
    assert [choice.text for choice in lists.choices] == [alone, alone]
    short = create(model="demo", prompt="Once", extra_body={"ignore_eos": True})
    assert short.usage.completion_tokens == 16
    with pytest.raises(openai.BadRequestError) as raised:
        create(prompt="Once", suffix="end", **ASKED)
    assert raised.value.param == "suffix"


def test_c24_openai_echo_with_logprobs_scores_a_prompt_exactly(openai_client):
    answer = openai_client.completions.create(
        model="demo", prompt="Once upon a time", max_tokens=0, echo=True, logprobs=1
    )
    table = answer.choices[0].logprobs
    assert answer.choices[0].text == "Once upon a time"
    assert "".join(table.tokens) == "Once upon a time"
    assert table.token_logprobs[0] is None
    assert table.text_offset[0] == 0
    greedy = openai_client.completions.create(prompt="Once upon", echo=True, logprobs=1, **ASKED)
    table = greedy.choices[0].logprobs
    pairs = list(zip(table.token_logprobs, table.top_logprobs, strict=True))
    assert all(logprob == max(top.values()) for logprob, top in pairs[-6:])
    assert all(logprob <= max(top.values()) for logprob, top in pairs[1:])


def test_c25_http_texts_become_tokens_and_texts_again(http):
    done = http.post("/tokenize", json={"prompt": "Once upon a time"}).json()
    assert done["count"] == len(done["tokens"]) > 0
    assert done["max_model_len"] == 2048
    back = http.post("/detokenize", json={"tokens": done["tokens"]}).json()
    assert back["prompt"] == "Once upon a time"
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"]
    assert info["model_max_length"] == 2048


def test_c26_openai_a_model_of_text_says_that_it_gives_no_vectors(openai_client):
    with pytest.raises(openai.BadRequestError) as raised:
        openai_client.embeddings.create(model="demo", input="Once")
    assert "embed" in str(raised.value)


def test_c29_http_an_unknown_field_is_named_and_with_strict_params_refused(http, start_server):
    asked = {"prompt": "Once", "max_tokens": 2, "colour": "red", "guess": 1}
    answer = http.post("/v1/completions", json=asked)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-params"] == "colour,guess"
    plain = http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 2})
    assert "x-ignored-params" not in plain.headers
    routes = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/responses": {"input": "x"},
        "/v1/messages": {"model": "demo", "messages": [{"role": "user", "content": "x"}]},
        "/generate": {"inputs": "x"},
        "/completion": {"prompt": "x", "n_predict": 2},
        "/tokenize": {"prompt": "x"},
    }
    strict = start_server("--strict-params").wait_ready()
    for route, body in routes.items():
        limit = {} if route in ("/generate", "/completion", "/tokenize") else {"max_tokens": 2}
        limit = {"max_output_tokens": 2} if route == "/v1/responses" else limit
        loose = http.post(route, json={**body, **limit, "colour": "red"})
        assert loose.headers["x-ignored-params"] == "colour", route
        refused = strict.http.post(route, json={**body, **limit, "colour": "red"})
        assert refused.status_code in (400, 422), route
        assert "colour" in refused.text
    assert strict.close() == 0


def test_c29_http_what_capabilities_refuse_is_a_400_that_names_it(http):
    (model,) = http.get("/v1/capabilities").json()["models"]
    refused = model["endpoints"]["/v1/completions"]["refused"]
    assert refused
    for name in refused:
        body = {"prompt": "x", "max_tokens": 2, name: {"a": 1}}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 400, name
        assert answer.json()["error"]["param"] == name
    for path, told in model["endpoints"].items():
        if not told["served"]:
            assert http.post(path, json={}).status_code == 400, path


def test_c32_http_it_says_how_far_it_is_and_drains(start_server):
    server = start_server()
    assert server.http.get("/livez").status_code == 200
    early = server.http.get("/readyz")
    assert early.status_code in (200, 503)
    if early.status_code == 503:
        assert {"status", "phase", "progress"} <= set(early.json())
    server.wait_ready()
    assert server.http.get("/health").status_code == 200
    asked = {"prompt": "Once", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=asked) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.terminate()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert not any("error" in line for line in rest)
    assert server.process.wait(30) == 0
