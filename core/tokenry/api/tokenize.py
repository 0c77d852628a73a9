"""/tokenize, /detokenize, /tokenizer_info: the model's tokenizer for clients that have none, as
vLLM serves it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tokenry.api.answer import ignored_header
from tokenry.api.body import read_json
from tokenry.api.chat import check_messages, render
from tokenry.api.schema import ChatRequest, decode_known
from tokenry.api.service import service_of
from tokenry.api.wire import JSON
from tokenry.errors import RequestError


class Tokenize(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: a prompt, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None


class Detokenize(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


async def tokenize(request: Request) -> Response:
    """Token ids of a prompt or of a chat."""
    service = service_of(request)
    data, strict = await read_json(request), service.config.strict_params
    wanted, unknown = decode_known(data, Tokenize, strict=strict)
    service.check_model(wanted.model)
    service.admit()
    tokenizer = service.engine.tokenizer
    if wanted.messages is not None:
        check_messages(wanted.messages)
        chat = ChatRequest(
            messages=wanted.messages,
            add_special_tokens=wanted.add_special_tokens,
            add_generation_prompt=wanted.add_generation_prompt,
            continue_final_message=wanted.continue_final_message,
            chat_template_kwargs=wanted.chat_template_kwargs,
            tools=wanted.tools,
        )
        prompt = await asyncio.to_thread(render, chat, tokenizer, service.answer_format)
        ids = list(prompt.token_ids)
    elif wanted.prompt is not None:
        special = True if wanted.add_special_tokens is None else wanted.add_special_tokens
        ids = await asyncio.to_thread(tokenizer.encode, wanted.prompt, special)
    else:
        raise RequestError("prompt or messages is needed.", param="prompt")
    texts = [tokenizer.token_text(i) for i in ids] if wanted.return_token_strs else None
    return JSON(
        {
            "count": len(ids),
            "max_model_len": service.engine.ready.max_model_len,
            "tokens": ids,
            "token_strs": texts,
        },
        headers=ignored_header(unknown),
    )


async def detokenize(request: Request) -> Response:
    """Text of token ids."""
    service = service_of(request)
    data, strict = await read_json(request), service.config.strict_params
    wanted, unknown = decode_known(data, Detokenize, strict=strict)
    service.check_model(wanted.model)
    service.admit()
    tokenizer = service.engine.tokenizer
    for i, token_id in enumerate(wanted.tokens):
        if not 0 <= token_id < tokenizer.vocab_size:
            raise RequestError(
                f"tokens[{i}] is {token_id}, ids are 0 to {tokenizer.vocab_size - 1}.",
                param=f"tokens[{i}]",
            )
    text = tokenizer.decode(wanted.tokens, skip_special_tokens=False)
    return JSON({"prompt": text}, headers=ignored_header(unknown))


async def tokenizer_info(request: Request) -> Response:
    """What lm-eval asks for before it uses the remote tokenizer."""
    service = service_of(request)
    service.admit()
    tokenizer = service.engine.tokenizer
    return JSON(
        {
            "tokenizer_class": "tokenizers.Tokenizer",
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.special_tokens.get("pad_token"),
            "unk_token": tokenizer.special_tokens.get("unk_token"),
            "eos_token_ids": tokenizer.eos_token_ids,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": service.engine.ready.max_model_len,
            "chat_template": None,
        }
    )
