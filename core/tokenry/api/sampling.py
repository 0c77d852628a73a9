"""Sampling fields beyond OpenAI's, as users of vLLM, llama.cpp and TGI know them, and what requests
get that do not set theirs.

In: fields of a request, the model's and the server's defaults. Out: fields of `SamplingParams`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokenry.config import ServerConfig
from tokenry.errors import RequestError
from tokenry.params import SamplingParams, Watermark


class CommonExtras(msgspec.Struct, frozen=True, kw_only=True):
    """What OpenAI's routes take beyond OpenAI's fields and llama.cpp's route takes, too. None is
    the default of `SamplingParams`. repeat_penalty and dry_penalty_last_n are llama.cpp's names.
    """

    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_range: int | None = None
    dry_penalty_last_n: int | None = None
    repeat_penalty: float | None = None


class SamplingExtras(CommonExtras, frozen=True, kw_only=True):
    """dry_sequence_breakers may be a JSON list in a string, as text-generation-webui sends it;
    watermark: true is the server's mark, or the green-list scheme with key 0. A beam search has
    beam_width beams, or best_of, or n as in vLLM; best_of without one is for completions.
    """

    dry_sequence_breakers: list[str] | str | None = None
    no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None
    watermark: bool | Watermark | None = None
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    beam_width: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None


PLAIN = (
    "typical_p",
    "top_n_sigma",
    "xtc_probability",
    "xtc_threshold",
    "mirostat",
    "mirostat_tau",
    "mirostat_eta",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_range",
    "no_repeat_ngram_size",
)
"""Fields with the name and the meaning that they have in `SamplingParams`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What requests get that do not say otherwise.

    values      fields of SamplingParams.   max_tokens: the most tokens of any answer.
    watermark   put on every answer.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    watermark: Watermark | None = None

    @staticmethod
    def of(model: Mapping[str, int | float], config: ServerConfig) -> Defaults:
        """Of the model (`Ready.sampling_defaults`) and the server."""
        values = dict(model)
        most = values.pop("max_tokens", None)
        return Defaults(
            values=values,
            max_tokens=None if most is None else int(most),
            watermark=watermark_of(config),
        )

    def limit(self, asked: int | None) -> int | None:
        """The answer's length where `asked` was asked for."""
        if self.max_tokens is None:
            return asked
        return self.max_tokens if asked is None else min(asked, self.max_tokens)


def watermark_of(config: ServerConfig) -> Watermark | None:
    """The server's own mark."""
    if config.watermark is None:
        return None
    return Watermark(
        scheme=config.watermark,
        key=config.watermark_key,
        gamma=config.watermark_gamma,
        delta=config.watermark_delta,
        context=config.watermark_context,
    )


def extras(request: SamplingExtras, defaults: Defaults) -> dict[str, Any]:
    """Fields of SamplingParams that the request's extras set. Raises RequestError."""
    given = {name: value for name in PLAIN if (value := getattr(request, name)) is not None}
    if request.repetition_penalty is not None:
        given["repetition_penalty"] = request.repetition_penalty
    _alias(given, "repetition_penalty", "repeat_penalty", request.repeat_penalty)
    _breakers(given, request.dry_sequence_breakers)
    last_n = request.dry_penalty_last_n
    if last_n is not None:
        if last_n < -1:
            text = f"dry_penalty_last_n must be -1 (all), 0 (off) or more, got {last_n}."
            raise RequestError(text, param="dry_penalty_last_n")
        if last_n == 0:
            given["dry_multiplier"] = 0.0
        else:
            _alias(given, "dry_range", "dry_penalty_last_n", max(0, last_n))
    given |= _beams(request)
    mark = _watermark(request.watermark, defaults.watermark)
    return given if mark is None else {**given, "watermark": mark}


def _beams(request: SamplingExtras) -> dict[str, Any]:
    """Fields of a beam search; {} where none is asked for."""
    if not request.use_beam_search and not request.beam_width:
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(request, name) not in (None, neutral):
                text = f"{name} needs use_beam_search: true."
                raise RequestError(text, param=name)
        return {}
    if request.use_beam_search is False:
        text = "beam_width needs use_beam_search: true (or none of the two)."
        raise RequestError(text, param="beam_width")
    widths = (request.beam_width, request.best_of, request.n, 1)
    given: dict[str, Any] = {"beam_width": next(w for w in widths if w is not None)}
    for name in ("length_penalty", "early_stopping"):
        if getattr(request, name) is not None:
            given[name] = getattr(request, name)
    if given["beam_width"] < 1:
        raise RequestError("A beam search has 1 beam or more.", param="beam_width")
    return given


def best_of(request: SamplingExtras, *, stream: bool) -> int | None:
    """How many completions are made for each that is given, None: no more than are given. Raises
    RequestError where they cannot be compared first.
    """
    most, n = request.best_of, request.n or 1
    if most is None or request.use_beam_search or request.beam_width:
        return None
    if most < n:
        raise RequestError(f"best_of ({most}) must not be below n ({n}).", param="best_of")
    if most > n and stream:
        text = "best_of compares finished completions, so it cannot be streamed."
        raise RequestError(text, param="best_of")
    return None if most == n else most


def _alias(given: dict[str, Any], name: str, alias: str, value: Any) -> None:
    if value is None:
        return
    if given.setdefault(name, value) != value:
        raise RequestError(f"{alias} and {name} are the same and differ.", param=alias)


def _breakers(given: dict[str, Any], breakers: list[str] | str | None) -> None:
    if breakers is None:
        return
    if isinstance(breakers, str):
        try:
            breakers = json.loads(breakers if breakers.lstrip()[:1] == "[" else f"[{breakers}]")
        except (ValueError, RecursionError):
            text = "dry_sequence_breakers must be a list of strings."
            raise RequestError(text, param="dry_sequence_breakers") from None
    given["dry_sequence_breakers"] = breakers


def _watermark(asked: bool | Watermark | None, own: Watermark | None) -> Watermark | None:
    if isinstance(asked, Watermark):
        if own is not None and asked != own:
            raise RequestError(
                "This server marks every answer with its own watermark.", param="watermark"
            )
        return asked
    return Watermark(scheme="kgw") if asked and own is None else own


def with_defaults(given: Mapping[str, Any], defaults: Defaults) -> SamplingParams:
    """SamplingParams of these fields and the defaults of the others; a beam search draws nothing,
    so defaults of drawing are not for it.
    """
    values = {} if given.get("beam_width") else defaults.values
    return SamplingParams(**{**values, **given})
