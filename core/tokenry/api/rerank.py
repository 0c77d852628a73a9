"""POST /score and the rerank routes: how well texts belong together, by a cross-encoder, that reads
both at once, or by the cosine of two embeddings.

/score has vLLM's shape, /v1/rerank and /rerank Jina's (which vLLM has, too), /v2/rerank Cohere's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tokenry.api.body import read_json
from tokenry.api.pooling import MAX_INPUTS, MEANINGLESS, Pooled, Vectors, usage_of
from tokenry.api.routes import Endpoint, post
from tokenry.api.schema import decode_known
from tokenry.api.service import service_of
from tokenry.errors import RequestError
from tokenry.outputs import RequestOutput
from tokenry.pooling import PoolingParams
from tokenry.text.pooling import PooledInput, PooledInputs, cosine, floats
from tokenry.vectors import check_scores, pairs_of

Made = tuple[list[float], list[RequestOutput]]


class ScoreRequest(Pooled, frozen=True, kw_only=True):
    """POST /score: text_1 with text_2, or queries with documents; one with many, or pair by
    pair. instruction: what the model is to judge, where it is told so in words.
    """

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    use_activation: bool | None = None
    instruction: str | None = None


class Document(msgspec.Struct, frozen=True):
    """A document that is an object."""

    text: str


class RerankRequest(Pooled, frozen=True, kw_only=True):
    """POST /v1/rerank and /v2/rerank.

    top_n               how many of the best are answered, None: all.
    max_tokens_per_doc  Cohere's: documents are cut to so many tokens, and to what the model takes.
    instruction         what the model is to judge, where it is told so in words.
    return_documents    whether results have their texts; None: as the route's owner does it.
    """

    query: str
    documents: list[str | Document]
    top_n: int | None = None
    max_tokens_per_doc: int | None = None
    return_documents: bool | None = None
    use_activation: bool | None = None
    instruction: str | None = None


class Scores:
    """Pairs of texts on their way to scores."""

    def __init__(self, vectors: Vectors, pairs: Sequence[tuple[str, str]]) -> None:
        if not 0 < len(pairs) <= MAX_INPUTS:
            raise RequestError(
                f"1 to {MAX_INPUTS} pairs can be scored at once, got {len(pairs)}.",
                param="documents",
            )
        self.crosses = check_scores(vectors.facts).pairs
        self._pairs = pairs
        self._texts = list(dict.fromkeys(text for pair in pairs for text in pair))

    def inputs(
        self, make: PooledInputs, names: Callable[[int], str], most: int | None = None
    ) -> list[PooledInput]:
        """One input per pair of a cross-encoder, else one per text. names: the field of pair i;
        most: tokens of a second text.
        """
        if self.crosses:
            return [
                make.pair(a, b, names(i), second_own=most) for i, (a, b) in enumerate(self._pairs)
            ]
        second = {b: i for i, (_, b) in enumerate(self._pairs)}
        return [
            make.one(text, names(second.get(text, 0)), own=most if text in second else None)
            for text in self._texts
        ]

    def of(self, outputs: Sequence[RequestOutput]) -> list[float]:
        """The scores, in the order of the pairs."""
        values = [floats(output.pooled or b"") for output in outputs]
        if self.crosses:
            return [value[0] for value in values]
        found = dict(zip(self._texts, values, strict=True))
        return [cosine(found[a], found[b]) for a, b in self._pairs]


async def score(request: Request) -> Response:
    """A score per pair."""
    service = service_of(request)
    data, strict = await read_json(request), service.config.strict_params
    wanted, unknown = decode_known(data, ScoreRequest, strict=strict, meaningless=MEANINGLESS)
    vectors = Vectors(request, service, wanted, "score")
    check_scores(vectors.facts)
    (_, a), (second, b) = _sides(wanted)
    scores = Scores(vectors, pairs_of(a, b, param=second))
    inputs = vectors.inputs(instruction=wanted.instruction)

    def names(i: int) -> str:
        return f"{second}[{i}]" if len(b) > 1 else second

    def make(outputs: list[RequestOutput]) -> dict[str, Any]:
        found = [
            {"index": i, "object": "score", "score": value}
            for i, value in enumerate(scores.of(outputs))
        ]
        return {**vectors.head, "data": found, "usage": usage_of(outputs)}

    params = _params(wanted.use_activation, scores)
    return await vectors.answer(lambda: scores.inputs(inputs, names), params, make, unknown)


def _sides(wanted: ScoreRequest) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    """(field, texts) of both sides."""
    names = ("text_1", "text_2") if wanted.queries is None else ("queries", "documents")
    given = [getattr(wanted, name) for name in names]
    for name, value in zip(names, given, strict=True):
        if value is None:
            raise RequestError(f"{name} is needed.", param=name)
    a, b = ([value] if isinstance(value, str) else value for value in given)
    return (names[0], a), (names[1], b)


def _params(use_activation: bool | None, scores: Scores) -> PoolingParams:
    if use_activation is not None and not scores.crosses:
        raise RequestError(
            "use_activation means nothing for this model: its scores are cosines.",
            param="use_activation",
        )
    return PoolingParams(final=use_activation)


async def jina_rerank(request: Request) -> Response:
    """Documents by relevance, as Jina and vLLM answer it."""

    def shape(vectors: Vectors, results: list[Any], usage: dict[str, int]) -> dict[str, Any]:
        head = vectors.head
        return {"id": head["id"], "model": head["model"], "usage": usage, "results": results}

    return await _rerank(request, shape, texts=True)


async def cohere_rerank(request: Request) -> Response:
    """Documents by relevance, as Cohere answers it."""

    def shape(vectors: Vectors, results: list[Any], usage: dict[str, int]) -> dict[str, Any]:
        meta = {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": usage["prompt_tokens"]},
        }
        return {"id": vectors.id, "results": results, "meta": meta}

    return await _rerank(request, shape, texts=False)


async def _rerank(
    request: Request,
    shape: Callable[[Vectors, list[Any], dict[str, int]], dict[str, Any]],
    *,
    texts: bool,
) -> Response:
    service = service_of(request)
    data, strict = await read_json(request), service.config.strict_params
    wanted, unknown = decode_known(data, RerankRequest, strict=strict, meaningless=MEANINGLESS)
    vectors = Vectors(request, service, wanted, "rerank")
    check_scores(vectors.facts)
    if wanted.top_n is not None and wanted.top_n < 1:
        raise RequestError(f"top_n must be at least 1, got {wanted.top_n}.", param="top_n")
    documents = [d if isinstance(d, str) else d.text for d in wanted.documents]
    scores = Scores(vectors, [(wanted.query, document) for document in documents])
    most = wanted.max_tokens_per_doc
    if most is not None and most < 1:
        raise RequestError(
            f"max_tokens_per_doc must be at least 1, got {most}.", param="max_tokens_per_doc"
        )
    # who lets documents be cut wants an answer: the rest is cut to what the model takes
    inputs = vectors.inputs(cut=most is not None, instruction=wanted.instruction)
    returned = texts if wanted.return_documents is None else wanted.return_documents

    def make(outputs: list[RequestOutput]) -> dict[str, Any]:
        found = scores.of(outputs)
        best = sorted(range(len(found)), key=lambda i: -found[i])[: wanted.top_n]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": found[i]} for i in best]
        if returned:
            results = [{**result, "document": {"text": documents[result["index"]]}}
                       for result in results]  # fmt: skip
        return shape(vectors, results, usage_of(outputs))

    params = _params(wanted.use_activation, scores)
    return await vectors.answer(
        lambda: scores.inputs(inputs, lambda i: f"documents[{i}]", most), params, make, unknown
    )


ENDPOINTS: tuple[Endpoint, ...] = (
    post("/score", score, "Scores of pairs of texts.", ScoreRequest),
    post("/v1/score", score, "As /score.", ScoreRequest),
    post("/rerank", jina_rerank, "As /v1/rerank.", RerankRequest),
    post("/v1/rerank", jina_rerank, "Documents by relevance, Jina's shape.", RerankRequest),
    post("/v2/rerank", cohere_rerank, "Documents by relevance, Cohere's shape.", RerankRequest),
)
