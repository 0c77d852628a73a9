"""What a request may hold: fields of OpenAI's API, and vLLM's sampling fields beside them.

In: parsed JSON. Out: `ChatRequest`, `CompletionRequest`, their `SamplingParams`, and the names of
unknown fields. A field that asks for something that cannot be served is a 400 that names it;
nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any, TypeVar

import msgspec

from tokenry.api.sampling import Defaults, best_of, extras, with_defaults
from tokenry.api.shape import ShapeFields, shape_of
from tokenry.api.wire import convert
from tokenry.errors import RequestError
from tokenry.params import SamplingParams

R = TypeVar("R", bound="_Sampling")
T = TypeVar("T", bound=msgspec.Struct)
MAX_STOPS = 64
MAX_STOP_CHARS = 4096
_Priority = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]

REFUSED = {
    "functions": "give functions as tools",
    "function_call": "give it as tool_choice",
    "audio": "this model gives text only",
    "prediction": "predicted outputs are not served",
    "web_search_options": "web search is not served",
    "logits_processors": "logits processors are not served",
    "logits_processor": "logits processors are not served over HTTP",
    "extra_args": "logits processors are not served over HTTP",
    "bad_words_ids": "give the words as bad_words",
    "chat_template": "start the server with --chat-template FILE instead",
    "truncate_prompt_tokens": "prompts are never truncated in silence",
    "lora_name": "LoRA adapters are not served yet",
}
"""Fields that ask for what we cannot give. Null, false and empty ask for nothing."""

_ONE_ROUTE = {
    "suffix": "it is for completions",
    "tools": "tools are for chats",
    "reasoning_effort": "it is for chats",
}

HARMLESS: dict[str, type] = {
    "user": str,
    "metadata": dict,
    "store": bool,
    "service_tier": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
}
"""Fields that do not change the text, and what they hold."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "detokenize": (True,),
}
"""Values of these fields that ask for what we do anyway."""


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's stream_options; continuous_usage_stats is vLLM's."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class _Sampling(ShapeFields, frozen=True, kw_only=True):
    """Fields that both endpoints have; None is the default of `SamplingParams`."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None
    deadline_ms: float | None = None
    priority: _Priority | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    add_special_tokens: bool | None = None


class ChatRequest(_Sampling, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None


class CompletionRequest(_Sampling, frozen=True, kw_only=True):
    """POST /v1/completions. `prompt`: str, [str], [int] or [[int]]."""

    prompt: Any
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None


_COPIED = [
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop_token_ids",
    "bad_words",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "logit_bias",
    "allowed_token_ids",
    "ttft_target_ms",
    "tpot_target_ms",
    "deadline_ms",
]


_MOST = {"bad_words": 1024, "dry_sequence_breakers": 64}
"""Texts that are looked up in the vocabulary before a request may run."""
_INSIDE = {
    "stream_options": StreamOptions.__struct_fields__,
    "response_format": ("type", "json_schema"),
    "response_format.json_schema": ("name", "description", "schema", "strict"),
}
"""Fields that objects in the body may have."""


def decode(data: dict[str, Any], kind: type[R], *, strict: bool) -> tuple[R, list[str]]:
    """The request, and the fields that mean nothing here (400 for them if `strict`)."""
    _refuse(data)
    for name in _ONE_ROUTE.keys() & data.keys() - set(kind.__struct_fields__):
        if data[name]:
            why = f"{name} cannot be served: {_ONE_ROUTE[name]}."
            raise RequestError(why, param=name, code="unsupported")
    meaningless = {*HARMLESS, *REFUSED, *_NEUTRAL}
    request, unknown = decode_known(data, kind, strict=strict, meaningless=meaningless)
    unknown += _unknown_inside(data, strict=strict)
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true.", param="stream_options")
    return request, unknown


def decode_known(
    data: dict[str, Any],
    kind: type[T],
    *,
    strict: bool,
    meaningless: Collection[str] = (),
) -> tuple[T, list[str]]:
    """The struct, and the fields that it does not have, without the `meaningless` ones (400 if
    `strict`).
    """
    known = set(kind.__struct_fields__)
    unknown = sorted(set(data) - known - set(meaningless))
    if unknown and strict:
        raise RequestError(f"There is no field {unknown[0]!r}.", param=unknown[0])
    return convert({name: value for name, value in data.items() if name in known}, kind), unknown


def _unknown_inside(data: dict[str, Any], *, strict: bool) -> list[str]:
    """Fields of objects in the body that mean nothing here, by their paths (400 if `strict`)."""
    found = []
    for path, known in _INSIDE.items():
        inner: Any = data
        for name in path.split("."):
            inner = inner.get(name) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            found += sorted(f"{path}.{name}" for name in set(inner) - set(known))
    if found and strict:
        raise RequestError(f"There is no field {found[0]!r}.", param=found[0])
    return found


def _refuse(data: dict[str, Any]) -> None:
    for name, why in REFUSED.items():
        if data.get(name):
            raise RequestError(f"{name} cannot be served: {why}.", param=name, code="unsupported")
    for name, neutral in _NEUTRAL.items():
        value = data.get(name)
        if value is not None and value not in neutral:
            raise RequestError(
                f"{name} {value!r} cannot be served; only {neutral[0]!r}.",
                param=name,
                code="unsupported",
            )
    for name, kind in HARMLESS.items():
        value = data.get(name)
        if value is not None and not isinstance(value, kind):
            what = {str: "a string", dict: "an object", bool: "true or false"}[kind]
            raise RequestError(f"{name} must be {what}, got {value!r}.", param=name)
    if data.get("store"):
        raise RequestError("store: answers are not stored here.", param="store", code="unsupported")


def chat_params(request: ChatRequest, defaults: Defaults) -> SamplingParams:
    """SamplingParams of a chat; without a limit the answer may fill the context."""
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
    if best_of(request, stream=bool(request.stream)) is not None:
        text = "best_of is for completions; a chat's n answers are those that are made."
        raise RequestError(text, param="best_of", code="unsupported")
    limit = request.max_completion_tokens
    _at_least_one("max_completion_tokens", limit)
    _at_least_one("max_tokens", request.max_tokens)
    if limit is None:
        limit = request.max_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    try:
        return _params(request, defaults, max_tokens=defaults.limit(limit), logprobs=logprobs)
    except RequestError as error:
        if error.param == "logprobs":
            error.param = "top_logprobs"
        raise


def completion_params(request: CompletionRequest, defaults: Defaults) -> SamplingParams:
    """SamplingParams of a completion; echo with logprobs needs the prompt's, too, and best_of makes
    more of them and needs their scores.
    """
    limit = 16 if request.max_tokens is None else request.max_tokens
    if not request.echo:
        _at_least_one("max_tokens", limit)
    prompt_logprobs, logprobs = request.prompt_logprobs, request.logprobs
    if request.echo and logprobs is not None:
        prompt_logprobs = max(logprobs, prompt_logprobs or 0)
    most = best_of(request, stream=bool(request.stream))
    if most is not None:
        logprobs = logprobs or 0
    n = request.n if most is None else most
    changed = msgspec.structs.replace(request, prompt_logprobs=prompt_logprobs, n=n)
    return _params(changed, defaults, max_tokens=defaults.limit(limit), logprobs=logprobs)


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise RequestError(f"{name} must be at least 1, got {value}.", param=name)


def check_stops(stops: Sequence[str], param: str) -> None:
    """Raises RequestError for more or longer stop strings than are looked for."""
    if len(stops) > MAX_STOPS:
        raise RequestError(f"At most {MAX_STOPS} stop strings are served.", param=param)
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise RequestError(
            f"A stop string may have {MAX_STOP_CHARS} characters at most.", param=param
        )


def _params(
    request: _Sampling, defaults: Defaults, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    values = {name: getattr(request, name) for name in _COPIED}
    given = {name: value for name, value in values.items() if value is not None}
    stop = request.stop
    if stop is not None:
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        check_stops(given["stop"], "stop")
    if request.temperature is not None and request.temperature > 2:
        raise RequestError(
            f"temperature must be in [0, 2], got {request.temperature}.", param="temperature"
        )
    given |= {"max_tokens": max_tokens, "logprobs": logprobs}
    shape = shape_of(request)
    if shape is not None:
        given["structured_outputs"] = shape
    given |= extras(request, defaults)
    for name, most in _MOST.items():
        _check_texts(name, given.get(name, ()), most)
    return with_defaults(given, defaults)


def _check_texts(name: str, texts: Sequence[str], most: int) -> None:
    if len(texts) > most:
        raise RequestError(f"At most {most} {name} are served, got {len(texts)}.", param=name)
    if any(isinstance(text, str) and len(text) > MAX_STOP_CHARS for text in texts):
        raise RequestError(
            f"Each of {name} may have {MAX_STOP_CHARS} characters at most.", param=name
        )
