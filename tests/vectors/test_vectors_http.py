"""The routes that answer with vectors, through the real server and OpenAI's client."""

import base64
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

pytestmark = pytest.mark.slow


class Server:
    """`tokenry serve` of several models on a free port."""

    def __init__(self, models: dict[str, Path]) -> None:
        aliases = [f"--alias={name}={path}" for name, path in models.items()]
        command = ["serve", *map(str, models.values()), *aliases, "--port", "0"]
        command += ["--backend", "cpu", "--backend-option", "threads=1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tokenry", *command], stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self.url = ""
        self._listens = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._listens.wait(60) and self.url, "".join(self.lines)
        self.http = httpx2.Client(base_url=self.url, timeout=60)

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.lines.append(line)
            if found := re.search(r"listening on (\S+),", line):
                self.url = found[1]
                self._listens.set()
        self._listens.set()

    def wait_ready(self) -> None:
        for _ in range(1200):
            if self.http.get("/readyz").status_code == 200:
                return
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.05)
        raise AssertionError("".join(self.lines))

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        assert self.process.wait(30) == 0, "".join(self.lines)


@pytest.fixture(scope="module")
def judge(make_judge: Any) -> Any:
    """Its directory's name says what it is."""
    path, model = make_judge(tied=True)
    return path.rename(path.with_name("Qwen3-Reranker-tiny")), model


@pytest.fixture(scope="module")
def server(bert: Any, cross: Any, classes: Any, judge: Any, make_model: Any) -> Iterator[Server]:
    causal, _ = make_model("LlamaConfig", "AutoModelForCausalLM")
    models = {"embed": bert[0], "cross": cross[0], "classes": classes[0], "text": causal}
    models["judge"] = judge[0]
    server = Server(models)
    server.wait_ready()
    yield server
    server.close()


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(server: Server, path: str, **body: Any) -> dict[str, Any]:
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    return dict(answer.json()["error"])


def near(got: Any, want: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(got), want, atol=1e-5, rtol=1e-5)


def test_openais_client_gets_embeddings(client: Any, bert: Any, ask: Any) -> None:
    texts = ["w3 w4", "w5"]
    answer = client.embeddings.create(model="embed", input=texts)  # base64, unasked
    plain = client.embeddings.create(model="embed", input=texts, encoding_format="float")
    ids = [[1, 7, 8, 2], [1, 9, 2]]
    assert answer.object == "list" and answer.model == "embed"
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == 7
    for i, one in enumerate(answer.data):
        assert (one.index, one.object) == (i, "embedding")
        near(one.embedding, functional.normalize(ask(bert[1], ids[i]).mean(0), dim=0))
        assert plain.data[i].embedding == pytest.approx(one.embedding, abs=1e-9)
    by_id = client.embeddings.create(model="embed", input=ids, encoding_format="float")
    assert [one.embedding for one in by_id.data] == [one.embedding for one in plain.data]
    one = client.embeddings.create(model="embed", input=ids[0], encoding_format="float")
    assert one.data[0].embedding == plain.data[0].embedding
    size = client.embeddings.create(model="embed", input="w1", dimensions=32)
    assert len(size.data[0].embedding) == 32


def test_base64_is_float32_little_endian(server: Server) -> None:
    body = {"model": "embed", "input": "w1"}
    packed = post(server, "/v1/embeddings", **body, encoding_format="base64")
    plain = post(server, "/v1/embeddings", **body)
    raw = base64.b64decode(packed["data"][0]["embedding"])
    values = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    assert values.tolist() == plain["data"][0]["embedding"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "w1", "dimensions": 8}, "dimensions"),
        ({"input": "w1", "dimensions": 0}, "dimensions"),
        ({"input": " ".join(["w1"] * 60)}, "input"),
        ({"input": ["w1", " ".join(["w1"] * 60)]}, "input[1]"),
        ({"input": "w1", "truncate_prompt_tokens": 41}, "truncate_prompt_tokens"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["w1", 3]}, "input[1]"),
        ({"input": [9999]}, "input"),
        ({"input": {"text": "w1"}}, "input"),
        ({"input": "w1", "encoding_format": "hex"}, "encoding_format"),
        ({}, "input"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:40],
)
def test_a_wrong_field_is_named(server: Server, body: dict[str, Any], param: str) -> None:
    error = refused(server, "/v1/embeddings", model="embed", **body)
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"


def test_truncation_is_done_when_asked_for(server: Server) -> None:
    long = " ".join(["w1"] * 60)
    body = {"model": "embed", "input": long}
    cut = post(server, "/v1/embeddings", **body, truncate_prompt_tokens=-1)
    assert cut["usage"]["prompt_tokens"] == 40
    assert refused(server, "/v1/embeddings", **body)["code"] == "context_length_exceeded"


def test_each_model_is_asked_for_what_it_gives(server: Server) -> None:
    for path, more in (
        ("/v1/embeddings", {"input": "w1"}),
        ("/classify", {"input": "w1"}),
        ("/pooling", {"input": "w1"}),
        ("/score", {"text_1": "w1", "text_2": "w2"}),
        ("/v1/rerank", {"query": "w1", "documents": ["w2"]}),
    ):
        error = refused(server, path, model="text", **more)
        assert "generates text" in error["message"] and error["param"] == "model"
    for model in ("embed", "cross", "classes"):
        for path, more in (
            ("/v1/completions", {"prompt": "w1"}),
            ("/v1/completions", {"prompt": "w1", "stream": True}),
        ):
            error = refused(server, path, model=model, **more)
            assert "does not generate text" in error["message"] and error["param"] == "model"
    assert "classes" in refused(server, "/classify", model="embed", input="w1")["message"]
    assert "embeddings" in refused(server, "/v1/embeddings", model="cross", input="w1")["message"]
    body = {"text_1": "w1", "text_2": "w2"}
    assert "3 classes" in refused(server, "/score", model="classes", **body)["message"]
    body = {"input": "w1", "task": "embed"}
    assert "embeddings" in refused(server, "/pooling", model="classes", **body)["message"]


def relevance(model: Any, query: str, document: str) -> float:
    ids = [[int(word[1:]) + 4 for word in side.split()] for side in (query, document)]
    first, second = [1, *ids[0], 2], [*ids[1], 2]
    with torch.no_grad():
        types = torch.tensor([[0] * len(first) + [1] * len(second)])
        return float(
            torch.sigmoid(model(torch.tensor([first + second]), token_type_ids=types).logits[0, 0])
        )


def test_rerank_orders_documents(server: Server, cross: Any) -> None:
    query, documents = "w3 w4", ["w5 w6", "w7", "w3 w4 w9"]
    want = [relevance(cross[1], query, document) for document in documents]
    order = sorted(range(3), key=lambda i: -want[i])
    body = {"model": "cross", "query": query, "documents": documents}
    for path in ("/rerank", "/v1/rerank"):
        answer = post(server, path, **body)
        assert [one["index"] for one in answer["results"]] == order
        near(
            [one["relevance_score"] for one in answer["results"]],
            torch.tensor(sorted(want))[[2, 1, 0]],
        )
        assert answer["results"][0]["document"] == {"text": documents[order[0]]}
        assert answer["model"] == "cross" and answer["usage"]["total_tokens"] == 21
    objects = [{"text": document} for document in documents]
    best = post(server, "/v1/rerank", **{**body, "documents": objects}, top_n=1,
                return_documents=False)  # fmt: skip
    assert [one["index"] for one in best["results"]] == order[:1]
    assert "document" not in best["results"][0]
    cohere = post(server, "/v2/rerank", **body, top_n=2)
    assert [one["index"] for one in cohere["results"]] == order[:2]
    assert set(cohere["results"][0]) == {"index", "relevance_score"}
    assert set(cohere) == {"id", "results", "meta"}
    cosines = post(server, "/v2/rerank", **{**body, "model": "embed"})["results"]
    vectors = post(server, "/v1/embeddings", model="embed", input=[query, *documents])["data"]
    first, *others = (torch.tensor(one["embedding"]) for one in vectors)
    for one in cosines:
        near(one["relevance_score"], first @ others[one["index"]])
    assert cosines == sorted(cosines, key=lambda one: -one["relevance_score"])


def test_a_decoder_that_says_yes_or_no_reranks(server: Server, judge: Any, judging: Any) -> None:
    query, documents = "w1 w2", ["w3", "w4 w5 w6", "w7 w8"]
    told = "Judge the Document provided"
    for more in ({}, {"instruction": told}):
        prompts = [judging.prompt(query, one, *more.values()) for one in documents]
        want = torch.stack([torch.softmax(judging.of(judge, one)[1], 0)[1] for one in prompts])
        body = {"model": "judge", "query": query, "documents": documents, **more}
        results = post(server, "/v2/rerank", **body)["results"]
        assert [one["index"] for one in results] == want.argsort(descending=True).tolist()
        near([one["relevance_score"] for one in results], want.sort(descending=True).values)
        body = {"model": "judge", "text_1": query, "text_2": documents, **more}
        near([one["score"] for one in post(server, "/score", **body)["data"]], want)
    cut = post(server, "/v1/rerank", model="judge", query=query, documents=["w4 w5 w6 w7"],
               max_tokens_per_doc=2)  # fmt: skip
    kept = torch.softmax(judging.of(judge, judging.prompt(query, "w4 w5"))[1], 0)[1]
    near(cut["results"][0]["relevance_score"], kept)
    for path, fields in (
        ("/v1/rerank", {"query": "w1", "documents": ["w2"]}),
        ("/score", {"text_1": "w1", "text_2": "w2"}),
    ):
        for model in ("cross", "embed"):
            error = refused(server, path, model=model, **fields, instruction=told)
            assert error["param"] == "instruction"
    assert refused(server, "/v1/completions", model="judge", prompt="w1")["param"] == "model"


def test_documents_are_cut_when_asked_for(server: Server) -> None:
    body = {"model": "cross", "query": "w1", "documents": ["w2", " ".join(["w3"] * 200)]}
    error = refused(server, "/v2/rerank", **body)
    assert error["param"] == "documents[1]" and error["code"] == "context_length_exceeded"
    short = post(server, "/v2/rerank", **{**body, "documents": ["w2", "w3 w3 w3"]})
    cut = post(server, "/v2/rerank", **body, max_tokens_per_doc=3)
    assert cut["results"] == short["results"]
    most = post(server, "/v2/rerank", **body, max_tokens_per_doc=4096)
    assert most["meta"]["tokens"]["input_tokens"] == 5 + 96
    cohere = server.http.post("/v2/rerank", json=body).json()
    assert "maximum context length is 96" in cohere["message"] and cohere["error"] == error
    for field in ("top_n", "max_tokens_per_doc"):
        assert refused(server, "/v2/rerank", **body, **{field: 0})["param"] == field


def test_scores_of_pairs(server: Server, cross: Any) -> None:
    body = {"model": "cross", "text_1": "w1", "text_2": ["w2", "w3 w4"]}
    for path in ("/score", "/v1/score"):
        answer = post(server, path, **body)
        assert [one["object"] for one in answer["data"]] == ["score"] * 2
        want = [relevance(cross[1], "w1", text) for text in ("w2", "w3 w4")]
        near([one["score"] for one in answer["data"]], torch.tensor(want))
    pairs = post(server, "/score", model="cross", queries=["w1", "w5"], documents=["w2", "w6"])
    near(pairs["data"][1]["score"], torch.tensor(relevance(cross[1], "w5", "w6")))
    raw = post(server, "/score", **body, use_activation=False)["data"][0]["score"]
    near(torch.sigmoid(torch.tensor(raw)), torch.tensor(want[0]))
    assert refused(server, "/score", model="cross", text_1="w1")["param"] == "text_2"
    wrong = {"model": "embed", "text_1": "w1", "text_2": "w2", "use_activation": False}
    assert refused(server, "/score", **wrong)["param"] == "use_activation"


def test_classes_and_pooling(server: Server, classes: Any, bert: Any, ask: Any) -> None:
    answer = post(server, "/classify", model="classes", input=["w1", "w2 w3"])
    with torch.no_grad():
        logits = classes[1](torch.tensor([[1, 5, 2]])).logits[0]
    first = answer["data"][0]
    near(first["probs"], torch.softmax(logits, 0))
    assert first["label"] == ("good", "bad", "ugly")[int(logits.argmax())]
    assert first["num_classes"] == 3 and answer["usage"]["total_tokens"] == 7
    raw = post(server, "/pooling", model="classes", input="w1", use_activation=False)
    near(raw["data"][0]["data"], logits)
    pooled = post(server, "/pooling", model="embed", input="w1", normalize=False)
    near(pooled["data"][0]["data"], ask(bert[1], [1, 5, 2]).mean(0))
    wrong = {"model": "classes", "input": "w1", "normalize": False}
    assert refused(server, "/pooling", **wrong)["param"] == "normalize"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=4,
)  # fmt: skip
FIELDS = (
    "input", "query", "documents", "text_1", "text_2", "queries", "dimensions", "top_n",
    "encoding_format", "truncate_prompt_tokens", "max_tokens_per_doc", "normalize", "task",
    "use_activation", "add_special_tokens", "priority", "request_id", "return_documents", "user",
)  # fmt: skip
USUAL = {
    "input": ["w1", "w2"], "query": "w1", "documents": ["w2"], "text_1": "w1", "text_2": "w2",
}  # fmt: skip


@given(
    path=st.sampled_from(
        ["/v1/embeddings", "/pooling", "/classify", "/score", "/v1/rerank", "/v2/rerank"]
    ),
    model=st.sampled_from(["embed", "cross", "classes", "text"]),
    fields=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_body_is_a_fault_of_the_server(
    server: Server, path: str, model: str, fields: dict[str, Any]
) -> None:
    answer = server.http.post(path, json={**USUAL, **fields, "model": model})
    assert answer.status_code in (200, 400), (path, model, fields, answer.text)


def test_capabilities_tell_what_each_model_gives(server: Server) -> None:
    told = {m["id"]: m["endpoints"] for m in server.http.get("/v1/capabilities").json()["models"]}
    paths = ("/v1/embeddings", "/classify", "/v1/completions")
    served = {name: [told[name][path]["served"] for path in paths] for name in told}
    assert served["embed"] == [True, False, False]
    assert served["cross"] == served["classes"] == [False, True, False]
    assert served["text"] == [False, False, True]


def test_the_server_says_what_to_try(server: Server) -> None:
    told = "".join(server.lines)
    assert "no KV cache: texts are read as a whole" in told
    assert re.search(r"try:  curl \S* ?\S*/v1/embeddings .*Once upon a time", told)


def test_unknown_fields_are_told(server: Server) -> None:
    body = {"model": "embed", "input": "w1", "user": "me", "frobnicate": 1}
    answer = server.http.post("/v1/embeddings", json=body)
    assert answer.headers["x-ignored-params"] == "frobnicate"


def test_many_clients_at_once_get_what_one_gets(server: Server) -> None:
    texts = [" ".join(f"w{j}" for j in range(i, i + 1 + i % 20)) for i in range(64)]
    body = {"model": "embed", "input": texts}
    want = post(server, "/v1/embeddings", **body)["data"]
    found: list[Any] = []

    def one() -> None:
        found.append(post(server, "/v1/embeddings", **body)["data"])

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [want] * 6
