"""/completion, /props, /apply-template: what clients of llama.cpp's server ask for.

In: its bodies. Out: its answers. The completions route answers; defaults are llama.cpp's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import tokenry
from tokenry.api.answer import ignored_header
from tokenry.api.body import read_json
from tokenry.api.chat import check_messages, render
from tokenry.api.completions import completions
from tokenry.api.inner import ask, body_of, is_answer, refuse
from tokenry.api.routes import get, post
from tokenry.api.sampling import CommonExtras
from tokenry.api.schema import ChatRequest, decode, decode_known
from tokenry.api.service import service_of
from tokenry.api.sse import TOKENS, EventStream
from tokenry.api.wire import JSON
from tokenry.errors import RequestError

REFUSED = {
    "n_probs": "ask /v1/completions with logprobs",
    "samplers": "the order of the samplers is fixed",
    "dynatemp_range": "the temperature is constant",
    "image_data": "this model takes text only",
    "lora": "LoRA adapters are not served yet",
    "t_max_predict_ms": "give n_predict, or close the connection",
    "input_prefix": "ask /v1/completions",
    "input_suffix": "ask /v1/completions",
    "response_fields": "answers are whole",
    "return_tokens": "ask /tokenize",
}
HARMLESS = ("cache_prompt", "id_slot", "slot_id", "n_keep", "timings_per_token", "api_key")
"""Fields that do not change the text; a prompt's beginning is cached without being asked."""
_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
_SAME = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "ignore_eos",
    "dry_sequence_breakers",
    *CommonExtras.__struct_fields__,
)


class LlamaRequest(CommonExtras, frozen=True, kw_only=True):
    """POST /completion."""

    prompt: str | list[int]
    model: str | None = None
    n_predict: int | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    dry_sequence_breakers: list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: list[tuple[int, float]] | dict[str, float] | None = None
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None


async def completion(request: Request) -> Response:
    """POST /completion."""
    service = service_of(request)
    data = await read_json(request)
    refuse(data, REFUSED)
    wanted, unknown = decode_known(
        data,
        LlamaRequest,
        strict=service.config.strict_params,
        meaningless=[*REFUSED, *HARMLESS],
    )
    model = service.check_model(wanted.model)
    service.admit()
    tokenizer, prompt = service.engine.tokenizer, wanted.prompt
    ids = await asyncio.to_thread(tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
    try:
        body = _body(wanted, ids, service.engine.ready.max_model_len)
        inner = await ask(request, completions, "/v1/completions", {**body, "model": model})
    except RequestError as error:
        error.param = "n_predict" if error.param == "max_tokens" else error.param
        raise
    if not is_answer(inner):
        return inner
    headers = ignored_header(unknown)
    if isinstance(inner, EventStream):
        events = _events(inner.events, model)
        return EventStream(events, headers, at_end=inner.at_end, manner=TOKENS)
    answer = body_of(inner)
    choice = answer["choices"][0]
    end = _end(choice, answer["usage"])
    head = {"content": choice["text"], "stop": True, "model": model, "index": 0}
    return JSON({**head, "prompt": wanted.prompt, **end}, headers=headers)


def _body(wanted: LlamaRequest, prompt_ids: list[int], max_model_len: int) -> dict[str, Any]:
    """The completions route's body; without a limit the answer may fill the context."""
    body = {name: getattr(wanted, name) for name in _SAME}
    for name, value in _DEFAULTS.items():
        body[name] = value if body[name] is None else body[name]
    bias = wanted.logit_bias
    body["logit_bias"] = {str(k): v for k, v in bias} if isinstance(bias, list) else bias
    if wanted.seed is not None and wanted.seed >= 0:
        body["seed"] = wanted.seed
    predict = -1 if wanted.n_predict is None else wanted.n_predict
    body["max_tokens"] = max(1, max_model_len - len(prompt_ids)) if predict < 0 else predict
    if wanted.json_schema is not None:
        body["structured_outputs"] = {"json": wanted.json_schema}
    elif wanted.grammar:
        body["structured_outputs"] = {"grammar": wanted.grammar}
    body["prompt"] = prompt_ids
    if wanted.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return {name: value for name, value in body.items() if value is not None}


async def _events(chunks: AsyncGenerator[Any, None], model: str) -> AsyncGenerator[Any, None]:
    """Events with what is new; the last says why it ended."""
    last: dict[str, Any] = {}
    async for chunk in chunks:
        if chunk is None:
            yield None
            continue
        for choice in chunk["choices"]:
            last = choice
            told = {"content": choice["text"], "stop": False, "index": 0, "model": model}
            yield told
        if chunk.get("usage") and not chunk["choices"]:
            end = _end(last, chunk["usage"])
            yield {"content": "", "stop": True, "index": 0, "model": model, **end}


def _end(choice: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
    stopped = choice.get("stop_reason")
    word = stopped if isinstance(stopped, str) else ""
    kind = "word" if word else "eos"
    return {
        "stop_type": "limit" if choice.get("finish_reason") == "length" else kind,
        "stopping_word": word,
        "tokens_predicted": usage["completion_tokens"],
        "tokens_evaluated": usage["prompt_tokens"],
        "tokens_cached": usage["prompt_tokens_details"]["cached_tokens"],
        "truncated": False,
    }


async def props(request: Request) -> Response:
    """GET /props."""
    service = service_of(request)
    service.admit()
    ready, tokenizer = service.engine.ready, service.engine.tokenizer
    return JSON(
        {
            "default_generation_settings": {"n_ctx": ready.max_model_len, "params": _DEFAULTS},
            "total_slots": service.engine.config.max_num_seqs,
            "model_alias": service.model_names[0],
            "model_path": service.engine.config.model,
            "modalities": {"vision": False, "audio": False},
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "build_info": f"tokenry {tokenry.__version__}",
        }
    )


async def apply_template(request: Request) -> Response:
    """POST /apply-template: the chat as the prompt's text."""
    service = service_of(request)
    data = await read_json(request)
    chat, unknown = decode(data, ChatRequest, strict=service.config.strict_params)
    service.check_model(chat.model)
    check_messages(chat.messages)
    service.admit()
    prompt = await asyncio.to_thread(render, chat, service.engine.tokenizer, service.answer_format)
    return JSON({"prompt": prompt.text}, headers=ignored_header(unknown))


ENDPOINTS = (
    post(
        "/completion",
        completion,
        "Continue a text, as llama.cpp's server.",
        LlamaRequest,
        refused=REFUSED,
    ),
    get("/props", props, "The model, as llama.cpp's server tells it."),
    post("/apply-template", apply_template, "The text of a chat's prompt.", ChatRequest),
)
