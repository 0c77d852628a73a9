"""How one request wants its tokens drawn, and when it ends: names and defaults as users of vLLM
know them.

In: keyword arguments from Python or decoded JSON. Out: a frozen, validated struct that crosses
processes as msgpack.
Every field that cannot be served is an error that names the field; nothing is dropped in silence.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from tokenry.errors import RequestError

MAX_LOGPROBS = 20
"""Most alternatives that `logprobs` and `prompt_logprobs` may ask for, as in OpenAI's API."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request.

    n                    completions of the prompt; completion i draws from seed + i.
    temperature          0 is greedy.   top_k 0 or -1, top_p 1 and min_p 0 switch their filter off.
    presence_penalty, frequency_penalty   subtracted once / per occurrence in the output;
                                          repetition_penalty divides
                         the logits of tokens that prompt or output hold (multiplies negative ones),
                         as transformers.
    seed                 same seed, same text, whatever else is in the batch; None: drawn by the
                         engine.
    stop                 strings that end the text (not part of it unless
                         include_stop_str_in_output).
    stop_token_ids       token ids that end it, besides the model's own; ignore_eos switches the
                         model's own off.
    bad_words            strings that must not appear.   bad_words_ids: the same, tokenized (filled
                         by the front).
    allowed_token_ids    only these may be drawn.   logit_bias: token id -> added to its logit,
                         -100..100.
    max_tokens           None: up to the context's end.   min_tokens: no end (EOS, stop token)
                         before these.
    logprobs             alternatives to report per output token, None: none.   prompt_logprobs: for
                         the prompt.
    logits_processor     name of a registered processor (`Hooks` of the sampler), with `extra_args`
                         as its arguments.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    logits_processor: str | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                msgspec.structs.force_setattr(self, name, tuple(value or ()))
        if self.allowed_token_ids is not None and not isinstance(self.allowed_token_ids, tuple):
            msgspec.structs.force_setattr(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        self._check()

    @property
    def greedy(self) -> bool:
        """No draw: the most likely token is taken."""
        return self.temperature < 1e-5

    @property
    def needs_history(self) -> bool:
        """The next draw depends on tokens that the host must know first, so the request waits for
        its last token.
        """
        return bool(self.bad_words_ids or self.logits_processor) or (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    def _check(self) -> None:
        _range("n", self.n, 1, 128)
        _range("temperature", self.temperature, 0, 100)
        _range("top_p", self.top_p, 0, 1, open_low=True)
        _range("top_k", self.top_k, -1, 2**31 - 1)
        _range("min_p", self.min_p, 0, 1)
        _range("presence_penalty", self.presence_penalty, -2, 2)
        _range("frequency_penalty", self.frequency_penalty, -2, 2)
        _range("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        if self.seed is not None:
            _range("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _range("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens}).",
                param="min_tokens",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _range(name, value, 0, MAX_LOGPROBS)
        if any(not s for s in self.stop):
            raise RequestError("A stop string must not be empty.", param="stop")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids must not be empty.", param="allowed_token_ids")
        for token, bias in (self.logit_bias or {}).items():
            _range(f"logit_bias.{token}", bias, -100, 100)


def _range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    bad = isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    if bad or value < low or value > high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise RequestError(f"{name} must be in {bracket}{low}, {high}], got {value!r}.", param=name)
