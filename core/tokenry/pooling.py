"""What one request wants computed of its text instead of an answer, and what it gets back.

In: keyword arguments from Python or decoded JSON. Out: a frozen, validated struct that crosses
processes as msgpack, and the results' names as users of vLLM know them. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from tokenry.errors import RequestError

Values = TypeVar("Values")


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Parameters of one request that ends with a vector.

    dimensions   an embedding's first so many values (matryoshka); None: all.
    final        whether the model's last function is applied: length 1 for an embedding, sigmoid or
                 softmax for a classifier. None: as the model's files say.
    second_text  first token of a pair's second text; None: one text.
    """

    dimensions: int | None = None
    final: bool | None = None
    second_text: int | None = None

    def __post_init__(self) -> None:
        if self.dimensions is not None and (
            type(self.dimensions) is not int or self.dimensions < 1
        ):
            raise RequestError(
                f"dimensions must be a whole number of at least 1, got {self.dimensions!r}.",
                param="dimensions",
            )


class PairTemplate(msgspec.Struct, frozen=True, kw_only=True):
    """The text that a pair becomes: prefix, before_instruction, the instruction, before_first, the
    first text, before_second, the second text, suffix. Prefix and suffix are never cut.

    instruction   where a request brings none.
    """

    prefix: str
    before_instruction: str
    instruction: str
    before_first: str
    before_second: str
    suffix: str


class PoolingFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a front must know of a model that gives vectors.

    kind         embed: an embedding; classify: a value for each of `labels` (one: a score).
    width        values of a result.
    matryoshka   what `dimensions` may be; (): any up to the width; None: nothing.
    pairs        whether a pair of texts is one input: a cross-encoder.
    template     what such a pair is written into; None: the tokenizer joins it.
    """

    kind: str
    width: int
    labels: tuple[str, ...] = ()
    matryoshka: tuple[int, ...] | None = None
    pairs: bool = False
    template: PairTemplate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingOutput:
    """Values of one input, float32; whatever the model gives."""

    data: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOutput:
    """One input's embedding."""

    embedding: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationOutput:
    """One input's probabilities, in the order of `labels`."""

    probs: tuple[float, ...]
    labels: tuple[str, ...]

    @property
    def label(self) -> str:
        """The likeliest."""
        return self.labels[max(range(len(self.probs)), key=self.probs.__getitem__)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOutput:
    """How well the two texts of a pair belong together."""

    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledRequest(Generic[Values]):
    """A finished request: its prompt and what was computed of it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: Values
    num_cached_tokens: int = 0
