"""What a request may ask for: refused here, by its field's name, before the engine hears of it.

In: prompt token ids, SamplingParams, what the engine said of its limits. Out: params with what the
engine cannot know filled in, or a `RequestError`. Knows no engine and no transport.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tokenry.errors import ContextLengthExceeded, RequestError
from tokenry.messages import RequestLimits
from tokenry.params import SamplingParams, check_whole
from tokenry.pooling import PoolingParams
from tokenry.text.breakers import Breakers
from tokenry.text.pooling import check_params, check_wanted
from tokenry.text.tokenizer import Tokenizer

NEUTRAL = SamplingParams()
MAX_BEAM_STOPS = 16
MAX_PRIORITY = 1000
"""A priority is worth a bounded number of steps (see engine/scheduler.py), so its size is, too."""


class Admission:
    """What every request of one front is held against."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_model_len: int,
        vocab_size: int,
        limits: RequestLimits,
    ) -> None:
        self._tokenizer = tokenizer
        self._breakers = Breakers(tokenizer)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._limits = limits

    def __call__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int,
        param: str,
        pooling: PoolingParams | None = None,
    ) -> SamplingParams:
        """The params, completed. Raises RequestError if the request cannot be served; `param` is
        the prompt's field.
        """
        self._check_task(pooling)
        self._check_prompt(prompt_ids, param, asked=params.max_tokens)
        self._check_ids(param, prompt_ids)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("logit_bias", tuple(params.logit_bias or ()))
        for word in params.bad_words_ids:
            self._check_ids("bad_words_ids", word)
        if params.stop and not params.detokenize:
            raise RequestError("Stop strings need the text: detokenize is false.", param="stop")
        if not params.spaces_between_special_tokens and self._tokenizer.puts_spaces:
            raise RequestError(
                "This tokenizer's decoder puts spaces between all tokens.",
                param="spaces_between_special_tokens",
            )
        self._check_limits(params, priority)
        words = tokenize_bad_words(params.bad_words, self._tokenizer)
        for word in words:
            self._check_ids("bad_words", word)
        if params.dry_multiplier:
            self._check_ids("dry_breaker_ids", params.dry_breaker_ids)
            ids = params.dry_breaker_ids or self._breakers.ids(params.dry_sequence_breakers)
            params = msgspec.structs.replace(params, dry_breaker_ids=ids)
        return complete_params(params, words, self._max_model_len - len(prompt_ids))

    def _check_prompt(self, prompt_ids: Sequence[int], param: str, *, asked: int | None) -> None:
        if not prompt_ids:
            raise RequestError("The prompt is empty: it has no token.", param=param)
        check_whole(param, prompt_ids)
        _check_room(len(prompt_ids), asked, self._max_model_len, param)

    def _check_limits(self, params: SamplingParams, priority: int) -> None:
        limits, name = self._limits, params.logits_processor
        if limits.max_top_k is not None and params.top_k > limits.max_top_k:
            raise RequestError(
                f"top_k is {params.top_k}, this device draws from {limits.max_top_k} at most.",
                param="top_k",
            )
        _check_beams(params, self._vocab_size)
        for field in limits.unserved:
            if getattr(params, field) != getattr(NEUTRAL, field):
                shape = params.structured_outputs  # its field has one of several names
                told = shape.param if field == "structured_outputs" and shape else field
                raise RequestError(
                    f"{told} cannot be served: this device draws by itself and gives no logits.",
                    param=told,
                    code="unsupported",
                )
        known = limits.logits_processors
        if name is not None and known is not None and name not in known:
            raise RequestError(
                f"There is no logits processor {name!r}; installed: {', '.join(known) or 'none'}.",
                param="logits_processor",
            )
        if type(priority) is not int or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            raise RequestError(
                f"priority must be a whole number in [-{MAX_PRIORITY}, {MAX_PRIORITY}], got "
                f"{priority!r}.",
                param="priority",
            )
        if priority != 0 and not limits.priorities:
            raise RequestError(
                f"priority is {priority}, but requests are served in the order of their arrival.",
                param="priority",
                mend="--scheduling-policy priority on the server, or no priority",
            )

    def _check_task(self, pooling: PoolingParams | None) -> None:
        """Tokens are asked only of a model that generates, vectors only of one that gives them."""
        vectors = self._limits.vectors
        if pooling is None and not self._limits.tokens:
            gives = "embeddings" if vectors is None or vectors.kind == "embed" else "scores"
            raise RequestError(
                f"This model gives {gives}; it does not generate text.",
                param="model",
                code="unsupported",
                mend="ask a generating model, or start this one with --task generate if it is one",
            )
        if pooling is not None:
            check_params(check_wanted(vectors, vectors.kind if vectors else "", "vectors"), pooling)

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        if ids and not (min(ids) >= 0 and max(ids) < self._vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self._vocab_size)
            raise RequestError(
                f"{name} has the token id {wrong}, the model's ids are 0 to "
                f"{self._vocab_size - 1}.",
                param=name,
            )


def _check_beams(params: SamplingParams, vocab_size: int) -> None:
    """Every beam tells its likeliest tokens, the more the more tokens can end it."""
    if params.beam_width > vocab_size:
        text = f"The model has {vocab_size} tokens, so no more beams than that."
        raise RequestError(text, param="beam_width")
    if params.beam_width and len(params.stop_token_ids) > MAX_BEAM_STOPS:
        text = f"A beam search takes at most {MAX_BEAM_STOPS} stop_token_ids."
        raise RequestError(text, param="stop_token_ids")


def check_answer_length(
    num_prompt: int, asked: int | None, max_model_len: int, *, param: str
) -> None:
    """Raises RequestError if prompt or answer do not fit; `asked` is None where nobody named a
    length, then the answer is cut to what is left. `param` is the prompt's field.
    """
    _check_room(num_prompt, asked, max_model_len, param)
    if asked is not None and num_prompt + asked > max_model_len:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, you "
            f"requested {num_prompt + asked} tokens ({num_prompt} in the prompt, "
            f"{asked} for the answer).",
            param="max_tokens",
            code="context_length_exceeded",
            mend=f"max_tokens of {max_model_len - num_prompt} or less, or none",
        )


def _check_room(num_prompt: int, asked: int | None, max_model_len: int, param: str) -> None:
    """An answer needs room for one token at least, unless none is asked for."""
    if num_prompt + (asked != 0) > max_model_len:
        raise ContextLengthExceeded(
            max_model_len=max_model_len, num_prompt_tokens=num_prompt, param=param
        )


def complete_params(
    params: SamplingParams, bad_words_ids: Sequence[tuple[int, ...]], num_remaining: int
) -> SamplingParams:
    """Params with what the engine cannot know: room for the answer, and bad words as token ids."""
    asked = params.max_tokens
    max_tokens = num_remaining if asked is None else min(asked, num_remaining)
    ids = (*params.bad_words_ids, *bad_words_ids)
    return msgspec.structs.replace(params, max_tokens=max_tokens, bad_words_ids=ids)


def tokenize_bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word at the beginning of a text and after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if not word.strip() or not ids:
                raise RequestError("A bad word must hold more than spaces.", param="bad_words")
            found[ids] = None
    return tuple(found)
