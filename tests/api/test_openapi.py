"""/openapi.json and /v1/capabilities say what the server does, no more and no less."""

import json
import re

from tokenry.api.app import ENDPOINTS
from tokenry.api.openapi import document
from tokenry.api.schema import REFUSED, ChatRequest


def test_the_document_has_every_route_and_resolves_every_reference():
    found = document(ENDPOINTS)
    served = {(re.sub(r":\w+}", "}", e.path), e.verb.lower()) for e in ENDPOINTS}
    told = {(path, verb) for path, verbs in found["paths"].items() for verb in verbs}
    assert told == served
    schemas = found["components"]["schemas"]
    refs = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(found)))
    assert refs <= set(schemas)
    assert {"ChatRequest", "ResponsesRequest", "MessagesRequest"} <= refs


def test_the_schema_of_a_body_is_what_the_server_takes(toy):
    schemas = toy.http.get("/openapi.json").json()["components"]["schemas"]
    chat = schemas["ChatRequest"]
    assert set(chat["properties"]) == set(ChatRequest.__struct_fields__)
    assert chat["required"] == ["messages"]
    wrong = toy.http.post("/v1/chat/completions", json={})
    assert wrong.json()["error"]["param"] == "messages"


def test_capabilities_tell_each_models_fields_and_refusals(toy):
    told = toy.http.get("/v1/capabilities").json()
    (model,) = told["models"]
    assert (model["id"], model["state"], model["generates"]) == ("demo", "ready", True)
    chat = model["endpoints"]["/v1/chat/completions"]
    assert "temperature" in chat["fields"]
    assert set(chat["refused"]) == set(REFUSED) - set(ChatRequest.__struct_fields__)
    assert all(chat["refused"].values())
    assert model["endpoints"]["/v1/audio/speech"]["served"] is False
    assert model["endpoints"]["/v1/embeddings"]["served"] is False
    for name in chat["refused"]:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, name: {"a": 1}}
        answer = toy.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400, name
        assert answer.json()["error"]["param"] == name


def test_what_a_text_model_cannot_do_is_said_on_its_route(toy):
    for path in ("/v1/audio/speech", "/v1/images/generations", "/v1/moderations"):
        error = toy.http.post(path, json={"model": "demo"}).json()["error"]
        assert error["code"] == "unsupported"
        assert "text model" in error["message"]


def test_llamas_routes_answer_whole_and_streamed(toy):
    asked = {"prompt": "Once", "n_predict": 6, "seed": 3, "ignore_eos": True}
    whole = toy.http.post("/completion", json=asked).json()
    assert whole["stop"] is True
    assert (whole["tokens_predicted"], whole["stop_type"]) == (6, "limit")
    lines = toy.http.post("/completion", json={**asked, "stream": True}).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(event["content"] for event in events) == whole["content"]
    assert [event["stop"] for event in events].count(True) == 1
    assert events[-1]["tokens_predicted"] == 6
    cut = toy.http.post("/completion", json={**asked, "stop": [whole["content"][2:5]]}).json()
    assert cut["stop_type"] == "word"
    assert cut["stopping_word"] == whole["content"][2:5]
    refused = toy.http.post("/completion", json={**asked, "n_probs": 3}).json()
    assert refused["error"]["param"] == "n_probs"
    chat = {"messages": [{"role": "user", "content": "Hello"}]}
    assert "Hello" in toy.http.post("/apply-template", json=chat).json()["prompt"]
    assert toy.http.get("/props").json()["default_generation_settings"]["n_ctx"] == 512


def test_every_dialects_tokenize(toy):
    ours = toy.http.post("/tokenize", json={"prompt": "Hé, Once"}).json()["tokens"]
    tgi = toy.http.post("/tokenize", json={"inputs": "Hé, Once"}).json()
    assert [token["id"] for token in tgi] == ours
    assert "".join(token["text"] for token in tgi).endswith("Hé, Once")
    assert all(token["stop"] - token["start"] == len(token["text"]) for token in tgi)
    llama = toy.http.post("/tokenize", json={"content": "Hé, Once"}).json()["tokens"]
    assert ours[-len(llama) :] == llama
    assert toy.http.post("/detokenize", json={"tokens": llama}).json()["content"] == "Hé, Once"
    both = toy.http.post("/tokenize", json={"prompt": "a", "content": "b"})
    assert both.json()["error"]["param"] == "prompt"


def test_a_flat_list_of_token_ids_is_a_prompt_of_llamas(toy):
    ids = toy.http.post("/tokenize", json={"prompt": "Once"}).json()["tokens"]
    asked = {"n_predict": 4, "temperature": 0, "ignore_eos": True}
    from_ids = toy.http.post("/completion", json={**asked, "prompt": ids}).json()
    from_text = toy.http.post("/completion", json={**asked, "prompt": "Once"}).json()
    assert from_ids["content"] == from_text["content"]
