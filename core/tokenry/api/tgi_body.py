"""What TGI's routes take, and the sampling parameters that it means.

In: decoded JSON. Out: `GenerateRequest` and SamplingParams. Ranges and defaults are TGI's (router,
validation.rs): without do_sample and without a warper the answer is greedy.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tokenry.api.schema import check_stops
from tokenry.errors import RequestError
from tokenry.params import SamplingParams, Watermark
from tokenry.structured import StructuredOutputs

REFUSED = {
    "adapter_id": "LoRA adapters are not served yet",
}
DEFAULT_TOKENS = 100
MAX_BEST_OF = 4


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """`parameters` of a generate request."""

    best_of: int | None = None
    decoder_input_details: bool | None = None
    details: bool | None = None
    do_sample: bool | None = None
    frequency_penalty: float | None = None
    grammar: dict[str, Any] | None = None
    max_new_tokens: int | None = None
    repetition_penalty: float | None = None
    return_full_text: bool | None = None
    seed: int | None = None
    stop: list[str] | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_n_tokens: int | None = None
    top_p: float | None = None
    truncate: int | None = None
    typical_p: float | None = None
    watermark: bool | None = None
    adapter_id: str | None = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /generate, /generate_stream and /; `stream` means something at / only."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None


def sampling_params(
    given: Parameters, *, stream: bool, mark: Watermark | None = None
) -> SamplingParams:
    """SamplingParams; raises RequestError that names the field.

    mark   the watermark that this server puts on every answer.
    """
    for name, why in REFUSED.items():
        if getattr(given, name):
            where = f"parameters.{name}"
            raise RequestError(f"{where} cannot be served: {why}.", param=where, code="unsupported")
    _check(given, stream=stream)
    warps = (given.top_k, given.top_p, given.typical_p)
    sampled = (
        bool(given.do_sample)
        or given.temperature not in (None, 1.0)
        or any(value is not None for value in warps)
    )
    best_of = given.best_of or 1
    stops = tuple(given.stop or given.stop_sequences or ())
    check_stops(stops, "parameters.stop")
    try:
        return SamplingParams(
            n=best_of,
            temperature=(given.temperature or 1.0) if sampled else 0.0,
            top_k=given.top_k or 0,
            top_p=1.0 if given.top_p is None else given.top_p,
            typical_p=1.0 if given.typical_p is None else given.typical_p,
            repetition_penalty=given.repetition_penalty or 1.0,
            frequency_penalty=given.frequency_penalty or 0.0,
            seed=given.seed,
            stop=stops,
            include_stop_str_in_output=True,
            max_tokens=given.max_new_tokens or DEFAULT_TOKENS,
            logprobs=given.top_n_tokens or 0,
            prompt_logprobs=0 if given.decoder_input_details else None,
            watermark=mark or (Watermark(scheme="kgw") if given.watermark else None),
            structured_outputs=_grammar(given.grammar),
        )
    except RequestError as error:
        error.param = f"parameters.{error.param}"
        raise


def _check(given: Parameters, *, stream: bool) -> None:
    """TGI's own rules."""
    _least(given, 1, "best_of", "max_new_tokens", "top_k", "truncate")
    _least(given, 0, "seed", "top_n_tokens")
    for name, most in (("top_p", 1.0), ("typical_p", 1.0)):
        value = getattr(given, name)
        if value is not None and not 0 < value < most:
            _wrong(name, f"must be > 0.0 and < {most}, got {value}")
    for name in ("temperature", "repetition_penalty"):
        value = getattr(given, name)
        if value is not None and not value > 0:
            _wrong(name, f"must be strictly positive, got {value}")
    if (given.top_n_tokens or 0) > 5:
        _wrong("top_n_tokens", f"must be <= 5, got {given.top_n_tokens}")
    if (given.best_of or 1) > MAX_BEST_OF:
        _wrong("best_of", f"must be <= {MAX_BEST_OF}, got {given.best_of}")
    if (given.best_of or 1) > 1:
        if not given.do_sample:
            _wrong("best_of", "needs do_sample: true")
        if given.seed is not None:
            _wrong("best_of", "and seed exclude each other")
        if stream:
            _wrong("best_of", "is not served in a stream")
    if given.decoder_input_details and stream:
        _wrong("decoder_input_details", "is not served in a stream")
    if given.stop and given.stop_sequences:
        _wrong("stop_sequences", "and stop are the same field")


def _least(given: Parameters, least: int, *names: str) -> None:
    for name in names:
        value = getattr(given, name)
        if value is not None and value < least:
            _wrong(name, f"must be >= {least}, got {value}")


def _wrong(name: str, what: str) -> None:
    where = f"parameters.{name}"
    raise RequestError(f"{where} {what}.", param=where)


def _grammar(grammar: dict[str, Any] | None) -> StructuredOutputs | None:
    if grammar is None:
        return None
    kind, value = grammar.get("type"), grammar.get("value")
    if kind in ("json", "json_schema"):
        if kind == "json_schema" and isinstance(value, dict):
            value = value.get("schema", value)
        return StructuredOutputs(json=value, param="grammar")
    if kind == "regex":
        return StructuredOutputs(regex=value, param="grammar")
    raise RequestError(f"grammar.type {kind!r} is not json or regex.", param="grammar.type")
