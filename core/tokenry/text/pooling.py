"""From texts to the inputs of a model that gives vectors, and from its bytes to numbers.

In: a text, token ids, or a pair of texts; how many tokens the user allows. Out: `PooledInput`,
whole or cut as asked, or a RequestError: nothing is cut in silence. Knows no engine and no
transport.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenry.errors import RequestError
from tokenry.pooling import PairTemplate, PoolingFacts, PoolingParams
from tokenry.text.tokenizer import FAR, SLACK, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledInput:
    """One input. second_text: where a pair's second text begins; param: its field in the
    request.
    """

    token_ids: tuple[int, ...]
    text: str | None = None
    second_text: int | None = None
    param: str = "input"


class PooledInputs:
    """Makes the inputs of one request.

    truncate  most tokens of an input, special ones included; -1: as many as the model takes; None:
              a longer one is refused.
    special   whether the tokens that the model wants around a text are added.
    template  what a pair is written into, where the model has such; instruction: in it.
    Raises RequestError for an instruction that no template takes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_len: int,
        truncate: int | None = None,
        special: bool = True,
        template: PairTemplate | None = None,
        instruction: str | None = None,
    ) -> None:
        if instruction is not None and template is None:
            raise RequestError(
                "instruction means nothing for this model: no prompt is written around its texts.",
                param="instruction",
            )
        self._template = template
        self._instruction = instruction
        self._core = tokenizer.core
        self._max_len = max_len
        self._special = special
        if truncate is not None and not (truncate == -1 or 1 <= truncate <= max_len):
            raise RequestError(
                f"truncate_prompt_tokens is {truncate}, it must be -1 or lie in 1..{max_len}.",
                param="truncate_prompt_tokens",
            )
        self._most = max_len if truncate == -1 else truncate

    def one(self, value: Any, param: str, *, own: int | None = None) -> PooledInput:
        """Of a text or token ids. own: most tokens of the text itself."""
        if isinstance(value, str):
            return self._text(value, param, own)
        if isinstance(value, (list, tuple)) and all(type(i) is int for i in value):
            ids = tuple(value)[: self._most]
            return self._checked(PooledInput(token_ids=ids, param=param))
        raise RequestError(f"{param} must be a text or a list of token ids.", param=param)

    def pair(
        self, first: str, second: str, param: str, *, second_own: int | None = None
    ) -> PooledInput:
        """Of two texts as one input, of a cross-encoder. second_own: most tokens of the second."""
        if self._template is not None:
            return self._judged(self._template, first, second, param, second_own)
        a, b = self._encode(first, param), self._encode(second, param)
        if second_own is not None:
            b.truncate(second_own)
        if self._most is not None:
            room = max(0, self._most - self._num_special(pair=True))
            n, m = _shares(len(a.ids), len(b.ids), room)
            a.truncate(n)
            b.truncate(m)
        whole = self._core.post_process(a, b, self._special)
        types = list(whole.type_ids)
        where = types.index(1) if 1 in types else None
        ids = tuple(whole.ids)
        return self._checked(PooledInput(token_ids=ids, second_text=where, param=param))

    def _judged(
        self, t: PairTemplate, first: str, second: str, param: str, second_own: int | None
    ) -> PooledInput:
        """The pair in the model's prompt; what is too long is cut at the second text's end."""
        if second_own is not None:
            second = self._beginning(second, second_own, param)
        said = t.instruction if self._instruction is None else self._instruction
        body = "".join((t.before_instruction, said, t.before_first, first, t.before_second, second))
        prefix, middle, suffix = (
            list(self._encode(part, param).ids) for part in (t.prefix, body, t.suffix)
        )
        if self._most is not None:
            middle = middle[: max(0, self._most - len(prefix) - len(suffix))]
        return self._checked(PooledInput(token_ids=(*prefix, *middle, *suffix), param=param))

    def _beginning(self, text: str, most: int, param: str) -> str:
        """The text of its first so many tokens."""
        ends = self._encode(text, param).offsets
        return text if len(ends) <= most else text[: ends[most - 1][1]]

    def _text(self, text: str, param: str, own: int | None) -> PooledInput:
        encoding = self._encode(text, param)
        if own is not None:
            encoding.truncate(own)
        if self._most is not None:
            encoding.truncate(max(0, self._most - self._num_special(pair=False)))
        ids = tuple(self._core.post_process(encoding, None, self._special).ids)
        return self._checked(PooledInput(token_ids=ids, text=text, param=param))

    def _num_special(self, *, pair: bool) -> int:
        number: int = self._core.num_special_tokens_to_add(pair) if self._special else 0
        return number

    def _encode(self, text: str, param: str) -> Any:
        """All tokens, or of a text that is far beyond the model's length more than it takes: the
        rest of it would be refused or cut.
        """
        try:
            chars = FAR * self._max_len
            while True:
                # the call for several texts lets other threads run meanwhile
                (found,) = self._core.encode_batch([text[:chars]], add_special_tokens=False)
                if chars >= len(text) or len(found.ids) > self._max_len + 2 * SLACK:
                    return found
                chars *= 2
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError(
                f"{param} cannot be encoded as UTF-8: {error}.", param=param
            ) from error

    def _checked(self, made: PooledInput) -> PooledInput:
        count = len(made.token_ids)
        if count == 0:
            raise RequestError(f"{made.param} has no tokens.", param=made.param)
        if count > self._max_len:
            far = count > self._max_len + SLACK
            has = f"more than {count - SLACK}" if far else str(count)
            raise RequestError(
                f"This model's maximum context length is {self._max_len} tokens. However, your "
                f"input has {has} tokens.",
                param=made.param,
                code="context_length_exceeded",
                mend=f"shorten it to {self._max_len} tokens, or truncate_prompt_tokens: -1",
            )
        return made


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens that each text of a pair keeps: the longer one is cut until both are as long, as
    transformers' longest_first does.
    """
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    shorter = min(shorter, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)


def floats(pooled: bytes) -> tuple[float, ...]:
    """The values of a vector as it crossed from the engine, float32 little-endian."""
    values = array.array("f")
    values.frombytes(pooled)
    if sys.byteorder == "big":
        values.byteswap()
    return tuple(values)


def cosine(first: Sequence[float], second: Sequence[float]) -> float:
    """Cosine of the angle between two vectors; 0 if one of them is 0."""
    dot = sum(a * b for a, b in zip(first, second, strict=True))
    norms = (sum(a * a for a in first) * sum(b * b for b in second)) ** 0.5
    return dot / norms if norms else 0.0


def check_wanted(facts: PoolingFacts | None, kind: str, what: str) -> PoolingFacts:
    """The facts of a model that gives this kind of vectors. Raises RequestError for any other.

    kind  embed or classify.     what  what was asked for, in words.
    """
    if facts is None:
        raise RequestError(
            f"This model generates text; it does not give {what}.",
            param="model",
            code="unsupported",
            mend="start the server with --task embed, or ask an embedding model",
        )
    if facts.kind != kind:
        gives = "embeddings" if facts.kind == "embed" else "scores or classes of a text"
        raise RequestError(
            f"This model gives {gives}; it does not give {what}.",
            param="model",
            code="unsupported",
        )
    return facts


def check_params(facts: PoolingFacts, params: PoolingParams) -> None:
    """Raises RequestError for dimensions that the model does not have."""
    wanted, sizes = params.dimensions, facts.matryoshka
    if wanted is None or (wanted == facts.width and facts.kind == "embed"):
        return
    if facts.kind != "embed" or sizes is None:
        raise RequestError(
            f"dimensions {wanted}: this model's vectors have {facts.width} values and were not "
            "trained to be cut.",
            param="dimensions",
            mend="leave dimensions out, or --matryoshka on the server",
        )
    if wanted > facts.width or (sizes and wanted not in sizes):
        known = ", ".join(map(str, sizes)) if sizes else f"1 to {facts.width}"
        raise RequestError(
            f"dimensions is {wanted}; this model's embeddings can have {known}.",
            param="dimensions",
        )
