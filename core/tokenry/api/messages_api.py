"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the chat route.

In: Anthropic's body. Out: its message, or its events message_start, content_block_start, _delta,
_stop, message_delta, message_stop (and ping in a silence). It only translates: the chat route
answers.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tokenry.api.answer import ignored_header
from tokenry.api.body import read_json
from tokenry.api.chat import chat_completions, check_messages, render
from tokenry.api.inner import Piece, Telling, ask, body_of, is_answer, refuse
from tokenry.api.messages_body import MessagesRequest, chat_body
from tokenry.api.routes import post
from tokenry.api.schema import ChatRequest, decode, decode_known
from tokenry.api.service import new_id, service_of
from tokenry.api.sse import MESSAGES, EventStream
from tokenry.api.wire import JSON
from tokenry.errors import RequestError

REFUSED = {
    "container": "there are no containers here",
    "mcp_servers": "the server calls no tools by itself",
    "context_management": "contexts are never edited in silence",
}
HARMLESS = ("metadata", "service_tier", "cache_control", "inference_geo")
"""Fields that do not change the text; a prompt's beginning is cached without being asked."""


async def messages(request: Request) -> Response:
    """POST /v1/messages."""
    wanted, unknown = await _read(request)
    if wanted.max_tokens is None:
        raise RequestError("max_tokens is missing.", param="max_tokens")
    model = service_of(request).check_model(wanted.model)
    inner = await ask(request, chat_completions, "/v1/chat/completions", chat_body(wanted))
    if not is_answer(inner):
        return inner
    answer = _Message(model)
    headers = {**ignored_header(unknown), "request-id": answer.id}
    if isinstance(inner, EventStream):
        events = answer.events(inner.events)
        return EventStream(events, headers, at_end=inner.at_end, manner=MESSAGES)
    return JSON(answer.whole(body_of(inner)), headers=headers)


async def count_tokens(request: Request) -> Response:
    """POST /v1/messages/count_tokens."""
    wanted, unknown = await _read(request)
    service = service_of(request)
    service.check_model(wanted.model)
    chat, _ = decode(chat_body(wanted), ChatRequest, strict=True)
    check_messages(chat.messages)
    service.admit()
    tokenizer, form = service.engine.tokenizer, service.answer_format
    prompt = await asyncio.to_thread(render, chat, tokenizer, form, whole=True)
    return JSON({"input_tokens": len(prompt.token_ids)}, headers=ignored_header(unknown))


async def _read(request: Request) -> tuple[MessagesRequest, list[str]]:
    data = await read_json(request)
    refuse(data, REFUSED)
    strict = service_of(request).config.strict_params
    return decode_known(data, MessagesRequest, strict=strict, meaningless=HARMLESS)


class _Message:
    """The answer: its content blocks, one after the other."""

    def __init__(self, model: str) -> None:
        self.id = new_id("msg").replace("-", "_")
        self._model = model
        self._telling = Telling()

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The message object."""
        blocks = [_block(piece) for piece in self._telling.whole(answer)]
        return {
            **self._head(),
            "content": blocks,
            **self._end(),
            "usage": self._usage(),
        }

    async def events(self, chunks: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """Events of a stream."""
        begun, index, open_block = False, -1, ("", 0)
        async for pieces in self._telling.pieces(chunks):
            if pieces is None:
                yield None
                continue
            if not begun:
                begun = True
                yield {"type": "message_start", "message": self._start()}
                yield {"type": "ping"}
            for piece in pieces:
                if (piece.kind, piece.call) != open_block:
                    if index >= 0:
                        yield {"type": "content_block_stop", "index": index}
                    index, open_block = index + 1, (piece.kind, piece.call)
                    yield {
                        "type": "content_block_start",
                        "index": index,
                        "content_block": _block(dataclasses.replace(piece, text="")),
                    }
                if piece.text:
                    yield {"type": "content_block_delta", "index": index, "delta": _delta(piece)}
        if index >= 0:
            yield {"type": "content_block_stop", "index": index}
        yield {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def _start(self) -> dict[str, Any]:
        usage = {**self._usage(), "output_tokens": 0}
        end = {"stop_reason": None, "stop_sequence": None}
        return {**self._head(), "content": [], **end, "usage": usage}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._model}

    def _end(self) -> dict[str, Any]:
        reason, stopped = self._telling.finish_reason, self._telling.stop_reason
        if self._telling.calls and reason == "stop":  # OpenAI's word where the call was asked for
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if reason == "stop" and isinstance(stopped, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stopped}
        names = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
        return {"stop_reason": names.get(reason or "", "end_turn"), "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """Cached tokens are not among the input tokens, as Anthropic counts."""
        usage = self._telling.usage
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return {
            "input_tokens": usage.get("prompt_tokens", 0) - cached,
            "output_tokens": usage.get("completion_tokens", 0),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
        }


def _block(piece: Piece) -> dict[str, Any]:
    """A content block."""
    if piece.kind == "call":
        given = msgspec.json.decode(piece.text) if piece.text else {}
        return {"type": "tool_use", "id": piece.call_id, "name": piece.name, "input": given}
    if piece.kind == "thought":
        return {"type": "thinking", "thinking": piece.text, "signature": ""}
    return {"type": "text", "text": piece.text}


def _delta(piece: Piece) -> dict[str, Any]:
    """What is new of the open block."""
    if piece.kind == "call":
        return {"type": "input_json_delta", "partial_json": piece.text}
    if piece.kind == "thought":
        return {"type": "thinking_delta", "thinking": piece.text}
    return {"type": "text_delta", "text": piece.text}


ENDPOINTS = (
    post("/v1/messages", messages, "Anthropic's messages.", MessagesRequest, refused=REFUSED),
    post(
        "/v1/messages/count_tokens",
        count_tokens,
        "Input tokens of Anthropic's messages.",
        MessagesRequest,
    ),
)
