"""`SamplingParams`: every parameter of drawing and ending, its default, meaning and range.

In: keyword arguments. Out: the struct, checked. Its values are as they were given, but for lists,
which are tuples, and dicts of a watermark or a structured output, which are structs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from tokenry.errors import RequestError
from tokenry.params.checks import as_tuple, check_range, check_whole
from tokenry.params.watermark import Watermark, as_watermark
from tokenry.structured import StructuredOutputs, structured_outputs

MAX_LOGPROBS = 20
"""Most alternatives that `logprobs` and `prompt_logprobs` may ask for, as in OpenAI's API."""

MAX_BREAKERS, MAX_BREAKER = 16, 64
"""Most `dry_sequence_breakers`, and most characters of one: each is looked for in the text of every
token.
"""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request.

    n                    completions of the prompt; completion i draws from seed + i.
    beam_width           beams of a beam search whose best n answers are given, 0: off. Ends are
                         compared by the sum of their log-probabilities / tokens ** length_penalty;
                         early_stopping: true ends with beam_width answers, false when no beam
                         scores better as it is, "never" when none can (as transformers).
    temperature          0 is greedy, up to 100 (over HTTP up to 2, as in OpenAI's API).
                         top_k 0 or -1, top_p 1 and min_p 0 switch their filter off.
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
    typical_p            keeps the tokens whose surprise is nearest to the expected one, up to this
                         mass (arXiv 2202.00666).   top_n_sigma: keeps logits within so many
                         standard deviations of the largest (arXiv 2411.07641), 0 or less: off.
    xtc_probability      how often all but the last of the tokens of at least xtc_threshold are left
                         out.
    mirostat             2: keep the surprise near mirostat_tau bits, corrected by mirostat_eta per
                         token (arXiv 2007.14966), 0: off.
    dry_multiplier       a token that would go on with a repeat of n tokens loses
                         dry_multiplier * dry_base ** (n - dry_allowed_length), n at least
                         dry_allowed_length, within the last dry_range tokens (0: all). Repeats do
                         not reach over dry_sequence_breakers (dry_breaker_ids: their tokens, filled
                         by the front).
    watermark            how the answer is marked, None: not at all; with temperature 0 the gumbel
                         scheme marks nothing and is refused.
    no_repeat_ngram_size no n-gram of this size comes twice, prompt included; 0: off.
    logits_processor     name of a registered processor (`Hooks` of the sampler), with `extra_args`
                         as its arguments.
    structured_outputs   a shape that the whole answer must have: `StructuredOutputs`, or a dict of
                         its fields.
    ttft_target_ms, tpot_target_ms, deadline_ms   milliseconds that are good enough: from arrival to
                         the first token; per token after it, on average; from arrival to the end.
                         Goodput counts them, the `slo` policy plans by them. None: no target.
    """

    n: int = 1
    beam_width: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
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
    typical_p: float = 1.0
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    dry_breaker_ids: tuple[int, ...] = ()
    no_repeat_ngram_size: int = 0
    watermark: Watermark | None = None
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None
    deadline_ms: float | None = None
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words", "dry_sequence_breakers"):
            value = getattr(self, name)
            self._set(name, (value,) if isinstance(value, str) else as_tuple(name, value))
        for name in ("stop_token_ids", "dry_breaker_ids"):
            self._set(name, as_tuple(name, getattr(self, name)))
        words = as_tuple("bad_words_ids", self.bad_words_ids)
        self._set("bad_words_ids", tuple(as_tuple("bad_words_ids", word) for word in words))
        if self.allowed_token_ids is not None:
            ids = as_tuple("allowed_token_ids", self.allowed_token_ids)
            self._set("allowed_token_ids", ids)
        if self.structured_outputs is not None:
            self._set("structured_outputs", structured_outputs(self.structured_outputs))
        if isinstance(self.watermark, dict):
            self._set("watermark", as_watermark(self.watermark))
        self._check_types()
        self._check_ranges()

    def _set(self, name: str, value: object) -> None:
        msgspec.structs.force_setattr(self, name, value)

    @property
    def greedy(self) -> bool:
        """No draw: the most likely token is taken."""
        return self.temperature < 1e-5

    @property
    def needs_history(self) -> bool:
        """The next draw depends on tokens that the host must know first, so the request waits for
        its last token.
        """
        return bool(self.bad_words_ids or self.logits_processor or self.structured_outputs) or (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
            or self.dry_multiplier != 0
            or self.no_repeat_ngram_size != 0
            or self.mirostat != 0
            or self.watermark is not None
        )

    def _check_types(self) -> None:
        """What msgpack would refuse on the other side, refused here, by name."""
        for name in ("stop", "bad_words", "dry_sequence_breakers"):
            if not all(isinstance(text, str) for text in getattr(self, name)):
                raise RequestError(f"{name} must hold strings.", param=name)
        if any(not text for text in self.stop):
            raise RequestError("A stop string must not be empty.", param="stop")
        check_whole("stop_token_ids", self.stop_token_ids)
        check_whole("dry_breaker_ids", self.dry_breaker_ids)
        check_whole("allowed_token_ids", self.allowed_token_ids or ())
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids must not be empty.", param="allowed_token_ids")
        for word in self.bad_words_ids:
            check_whole("bad_words_ids", word)
            if not word:
                raise RequestError("A bad word must have a token.", param="bad_words_ids")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                text = f"{name} must be true or false, got {getattr(self, name)!r}."
                raise RequestError(text, param=name)
        kinds = {"logit_bias": dict, "logits_processor": str, "extra_args": dict}
        for name, kind in {**kinds, "watermark": Watermark}.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise RequestError(f"{name} must be a {kind.__name__}.", param=name)
        check_whole("logit_bias", tuple(self.logit_bias or ()))

    def _check_ranges(self) -> None:
        check_range("n", self.n, 1, 128, whole=True)
        check_range("temperature", self.temperature, 0, 100)
        check_range("top_p", self.top_p, 0, 1, open_low=True)
        check_range("top_k", self.top_k, -1, 2**31 - 1, whole=True)
        check_range("min_p", self.min_p, 0, 1)
        check_range("presence_penalty", self.presence_penalty, -2, 2)
        check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        check_range("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        self._check_extras()
        self._check_beams()
        if self.seed is not None:
            check_range("seed", self.seed, -(2**63), 2**64 - 1, whole=True)
        if self.max_tokens is not None:
            check_range("max_tokens", self.max_tokens, 0, 2**31 - 1, whole=True)
        check_range("min_tokens", self.min_tokens, 0, 2**31 - 1, whole=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens}).",
                param="min_tokens",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, 0, MAX_LOGPROBS, whole=True)
        for name in ("ttft_target_ms", "tpot_target_ms", "deadline_ms"):
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, 0, 1e9, open_low=True)
        for token, bias in (self.logit_bias or {}).items():
            check_range(f"logit_bias.{token}", bias, -100, 100)

    def _check_beams(self) -> None:
        check_range("beam_width", self.beam_width, 0, 64, whole=True)
        check_range("length_penalty", self.length_penalty, -100, 100)
        if self.early_stopping not in (True, False, "never"):
            text = f"early_stopping must be true, false or 'never', got {self.early_stopping!r}."
            raise RequestError(text, param="early_stopping")
        if not self.beam_width:
            return
        if self.n > self.beam_width:
            text = f"n is {self.n}, a search with {self.beam_width} beams has no more answers."
            raise RequestError(text, param="n")
        if self.max_tokens == 0:
            raise RequestError("A beam search needs max_tokens of 1 or more.", param="max_tokens")
        fields = {field.name: field for field in msgspec.structs.fields(type(self))}
        for name in NOT_WITH_BEAMS:
            value = getattr(self, name)
            if value != fields[name].default and not (name == "temperature" and value == 0):
                raise RequestError(
                    f"{name} cannot be served with a beam search, which draws nothing.",
                    param=name,
                    code="unsupported",
                )

    def _check_extras(self) -> None:
        check_range("typical_p", self.typical_p, 0, 1, open_low=True)
        check_range("top_n_sigma", self.top_n_sigma, -1, 1000)
        check_range("xtc_probability", self.xtc_probability, 0, 1)
        check_range("xtc_threshold", self.xtc_threshold, 0, 1)
        if self.mirostat not in (0, 2) or isinstance(self.mirostat, bool):
            raise RequestError(
                f"mirostat must be 0 (off) or 2, got {self.mirostat!r}.", param="mirostat"
            )
        check_range("mirostat_tau", self.mirostat_tau, 0, 1000)
        check_range("mirostat_eta", self.mirostat_eta, 0, 100)
        check_range("dry_multiplier", self.dry_multiplier, 0, 1000)
        check_range("dry_base", self.dry_base, 1, 1000)
        check_range("dry_allowed_length", self.dry_allowed_length, 1, 10_000, whole=True)
        check_range("dry_range", self.dry_range, 0, 2**31 - 1, whole=True)
        check_range("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, 10_000, whole=True)
        mark = self.watermark
        if mark is not None and mark.scheme == "gumbel" and self.greedy:
            text = "The gumbel watermark needs a temperature above 0: nothing is drawn at 0."
            raise RequestError(text, param="watermark")
        if len(self.dry_sequence_breakers) > MAX_BREAKERS:
            text = f"At most {MAX_BREAKERS} dry_sequence_breakers are served."
            raise RequestError(text, param="dry_sequence_breakers")
        if any(not 0 < len(text) <= MAX_BREAKER for text in self.dry_sequence_breakers):
            text = f"A sequence breaker has 1 to {MAX_BREAKER} characters."
            raise RequestError(text, param="dry_sequence_breakers")


NEEDS_LOGITS = (
    "beam_width",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_p",
    "min_tokens",
    "bad_words",
    "logit_bias",
    "allowed_token_ids",
    "logits_processor",
    "logprobs",
    "prompt_logprobs",
    "typical_p",
    "top_n_sigma",
    "xtc_probability",
    "mirostat",
    "dry_multiplier",
    "no_repeat_ngram_size",
    "watermark",
    "structured_outputs",
)
"""Fields that no device serves which gives token ids instead of logits."""
NOT_WITH_BEAMS = (
    *(name for name in NEEDS_LOGITS if name not in ("logprobs", "beam_width")),
    "temperature",
    "top_p",
    "top_k",
    "stop",
    "bad_words_ids",
)
"""Fields whose values a beam search could not honour."""

_FLAGS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


def default_params(defaults: Mapping[str, int | float], **given: Any) -> SamplingParams:
    """SamplingParams of what was given and of the model's own defaults, whose max_tokens is the
    most that anybody gets (see `Ready.sampling_defaults`).
    """
    values = {**defaults, **given}
    asked, most = given.get("max_tokens"), defaults.get("max_tokens")
    if most is not None:
        values["max_tokens"] = most if asked is None else min(asked, most)
    return SamplingParams(**values)
