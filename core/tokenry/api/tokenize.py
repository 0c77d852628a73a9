"""/tokenize, /detokenize, /tokenizer_info: the model's tokenizer for clients that have none, as
vLLM serves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
from tokenry.text.detokenizer import make_detokenizer
from tokenry.text.tokenizer import Tokenizer


class Tokenize(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: a prompt, or a chat. `inputs` is TGI's name of a prompt, and its answer is
    TGI's; `content` and `add_special` are llama.cpp's.
    """

    model: str | None = None
    prompt: str | None = None
    inputs: str | None = None
    content: str | None = None
    add_special: bool | None = None
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
    special = True if wanted.add_special_tokens is None else wanted.add_special_tokens
    prompt = wanted.prompt if wanted.inputs is None else wanted.inputs
    if wanted.content is not None:
        prompt, special = wanted.content, bool(wanted.add_special)
    given = (wanted.prompt, wanted.inputs, wanted.content, wanted.messages)
    if sum(one is not None for one in given) != 1:
        raise RequestError(
            "Exactly one of prompt, messages, inputs and content is needed.", param="prompt"
        )
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
        form = service.answer_format
        made = await asyncio.to_thread(render, chat, tokenizer, form, whole=True)
        ids = list(made.token_ids)
    else:
        assert prompt is not None
        ids = await asyncio.to_thread(tokenizer.encode, prompt, special, whole=True)
    if wanted.inputs is not None:
        return JSON(pieces(tokenizer, ids), headers=ignored_header(unknown))
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
    return JSON({"prompt": text, "content": text}, headers=ignored_header(unknown))


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[dict[str, Any]]:
    """TGI's tokens: each with its text and where that lies in the whole."""
    detokenizer = make_detokenizer(tokenizer, skip_special_tokens=False)
    found, at = [], 0
    for token_id in ids:
        text = detokenizer.feed((token_id,))
        found.append({"id": token_id, "text": text, "start": at, "stop": at + len(text)})
        at += len(text)
    return found


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
