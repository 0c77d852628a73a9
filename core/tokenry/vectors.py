"""Embeddings, scores and classes from the offline Python API.

In: texts, token ids or pairs of texts. Out: results in their order, with vLLM's names. Owned by an
`LLM`, whose engine computes; this file only makes inputs and reads results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tokenry.errors import RequestError
from tokenry.messages import Ready
from tokenry.outputs import RequestOutput
from tokenry.pooling import (
    ClassificationOutput,
    EmbeddingOutput,
    PooledRequest,
    PoolingFacts,
    PoolingOutput,
    PoolingParams,
    ScoringOutput,
)
from tokenry.text.pooling import PooledInput, PooledInputs, check_wanted, cosine, floats
from tokenry.text.tokenizer import Tokenizer

Run = Callable[[Sequence[PooledInput], PoolingParams], list[RequestOutput]]
Text = str | Sequence[int]
T = TypeVar("T")


class Vectors:
    """One call's view of the model.

    run       computes inputs, each with its second_text laid into the params.
    truncate  as truncate_prompt_tokens over HTTP: -1 cuts inputs to the model's length.
    """

    def __init__(
        self, tokenizer: Tokenizer, ready: Ready, run: Run, *, truncate: int | None = None
    ) -> None:
        self._facts = ready.limits.vectors
        self._inputs = PooledInputs(
            tokenizer,
            max_len=ready.max_model_len,
            truncate=truncate,
            template=None if self._facts is None else self._facts.template,
        )
        self._run = run

    def encode(
        self, texts: Text | Sequence[Text], params: PoolingParams | None = None
    ) -> list[PooledRequest[PoolingOutput]]:
        """Whatever the model gives."""
        if self._facts is None:
            check_wanted(None, "embed", "vectors")
        return self._each(texts, params, lambda values: PoolingOutput(data=values))

    def embed(
        self, texts: Text | Sequence[Text], params: PoolingParams | None = None
    ) -> list[PooledRequest[EmbeddingOutput]]:
        """One embedding per text."""
        check_wanted(self._facts, "embed", "embeddings")
        return self._each(texts, params, lambda values: EmbeddingOutput(embedding=values))

    def classify(
        self, texts: Text | Sequence[Text], params: PoolingParams | None = None
    ) -> list[PooledRequest[ClassificationOutput]]:
        """Probabilities of each text's classes."""
        labels = check_wanted(self._facts, "classify", "classes").labels
        return self._each(
            texts, params, lambda values: ClassificationOutput(probs=values, labels=labels)
        )

    def score(
        self,
        first: str | Sequence[str],
        second: str | Sequence[str],
        params: PoolingParams | None = None,
    ) -> list[PooledRequest[ScoringOutput]]:
        """One score per pair, see `pairs_of`: a cross-encoder's, or the cosine of two
        embeddings.
        """
        pairs = pairs_of(_texts(first), _texts(second))
        if check_scores(self._facts).kind == "embed":
            return self._by_cosine(pairs, params)
        inputs = [self._inputs.pair(a, b, f"pairs[{i}]") for i, (a, b) in enumerate(pairs)]
        return [
            _result(output, ScoringOutput(score=_values(output)[0]))
            for output in self._run(inputs, params or PoolingParams())
        ]

    def _by_cosine(
        self, pairs: Sequence[tuple[str, str]], params: PoolingParams | None
    ) -> list[PooledRequest[ScoringOutput]]:
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        found = dict(zip(texts, self.embed(texts, params), strict=True))
        return [
            PooledRequest(
                request_id=found[a].request_id,
                prompt_token_ids=found[a].prompt_token_ids + found[b].prompt_token_ids,
                outputs=ScoringOutput(
                    score=cosine(found[a].outputs.embedding, found[b].outputs.embedding)
                ),
            )
            for a, b in pairs
        ]

    def _each(
        self,
        texts: Text | Sequence[Text],
        params: PoolingParams | None,
        make: Callable[[tuple[float, ...]], T],
    ) -> list[PooledRequest[T]]:
        inputs = [self._inputs.one(t, f"prompts[{i}]") for i, t in enumerate(_texts(texts))]
        outputs = self._run(inputs, params or PoolingParams())
        return [_result(output, make(_values(output))) for output in outputs]


def pooled_request(output: RequestOutput) -> PooledRequest[PoolingOutput]:
    """A finished request's values, whatever they are."""
    return _result(output, PoolingOutput(data=_values(output)))


def _values(output: RequestOutput) -> tuple[float, ...]:
    return floats(output.pooled or b"")


def _result(output: RequestOutput, outputs: T) -> PooledRequest[T]:
    return PooledRequest(
        request_id=output.request_id,
        prompt_token_ids=output.prompt_token_ids,
        outputs=outputs,
        num_cached_tokens=output.num_cached_tokens,
    )


def _texts(texts: Any) -> list[Any]:
    """One text or many; a list of ints is one."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence):
        raise RequestError(
            f"A text, token ids or a list of such is needed, got a {type(texts).__name__}.",
            param="prompts",
        )
    return [list(texts)] if texts and isinstance(texts[0], int) else list(texts)


def pairs_of(
    first: Sequence[str], second: Sequence[str], *, param: str = "text_2"
) -> list[tuple[str, str]]:
    """Pairs of one text with each of many, or of as many with as many. Raises RequestError that
    names `param`.
    """
    if len(first) == 1:
        return [(first[0], text) for text in second]
    if len(first) != len(second):
        raise RequestError(
            f"{len(first)} texts cannot be paired with {len(second)}.",
            param=param,
            mend="one text and many, or as many as the others",
        )
    return list(zip(first, second, strict=True))


def check_scores(facts: PoolingFacts | None) -> PoolingFacts:
    """The facts of a model that scores pairs: an embedding model, or a classifier of one label."""
    if facts is None or facts.kind == "embed":
        return check_wanted(facts, "embed", "scores of pairs")
    if facts.width != 1:
        raise RequestError(
            f"This model has {facts.width} classes; a score needs a model with one.",
            param="model",
            code="unsupported",
            mend="POST /classify",
        )
    return facts
