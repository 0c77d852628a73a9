"""The way of other dialects (Anthropic's, OpenAI's responses, batches) through our own routes.

In: the body that the route takes, made from another dialect's. Out: the route's JSON, or the chunks
of its stream as the pieces that every dialect tells in its own words. So a feature of the chat
route is at once one of all dialects, and what the chat route refuses, all refuse.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from tokenry.api.routes import Handler
from tokenry.api.sse import EventStream
from tokenry.errors import RequestError

_KEPT = (b"authorization", b"x-api-key", b"x-request-id", b"user-agent", b"traceparent")
"""Headers that an inner request keeps of its outer one."""


async def ask(request: Request, handler: Handler, path: str, body: Mapping[str, Any]) -> Response:
    """The handler's response to the body. Raises what the handler raises.

    The client is the outer request's: when it goes, the inner request ends.
    """
    data: bytes | None = msgspec.json.encode(body)

    async def receive() -> Message:
        nonlocal data
        if data is None:
            return await request.receive()
        sent, data = data, None
        return {"type": "http.request", "body": sent, "more_body": False}

    kept = [(name, value) for name, value in request.scope["headers"] if name in _KEPT]
    headers = [*kept, (b"content-type", b"application/json")]
    scope = {**request.scope, "method": "POST", "path": path, "headers": headers}
    return await handler(Request(scope, receive))


def body_of(response: Response) -> dict[str, Any]:
    """The JSON object of an inner response that is no stream."""
    data: dict[str, Any] = msgspec.json.decode(bytes(response.body))
    return data


def is_answer(response: Response) -> bool:
    """Whether there is an answer to retell (no: the client went meanwhile)."""
    return isinstance(response, EventStream) or response.status_code == 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """News of one answer.

    text    of the answer, of a thought before it, or a call's arguments (JSON).
    call    which call, from 0; call_id and name come with its first piece.
    logprobs  OpenAI's entries of the piece's tokens.
    """

    kind: Literal["text", "thought", "call"]
    text: str = ""
    call: int = 0
    call_id: str = ""
    name: str = ""
    logprobs: tuple[dict[str, Any], ...] = ()


class Telling:
    """One choice of a chat, piece by piece, and what is known of it so far."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.calls = False
        self.usage: dict[str, Any] = {}

    async def pieces(
        self, chunks: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[list[Piece] | None, None]:
        """Pieces of each chunk of a stream; None is a silence."""
        async for chunk in chunks:
            yield None if chunk is None else self.take(chunk)

    def take(self, chunk: dict[str, Any]) -> list[Piece]:
        """Pieces of a chat.completion.chunk."""
        self.usage = chunk.get("usage") or self.usage
        found: list[Piece] = []
        for choice in chunk["choices"]:
            found += self._read(choice, choice["delta"])
        return found

    def whole(self, answer: dict[str, Any]) -> list[Piece]:
        """Pieces of a chat.completion."""
        self.usage = answer["usage"]
        choice = answer["choices"][0]
        return self._read(choice, choice["message"])

    def _read(self, choice: dict[str, Any], message: dict[str, Any]) -> list[Piece]:
        found = []
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.stop_reason = choice.get("stop_reason") or self.stop_reason
        thought = message.get("reasoning_content") or message.get("reasoning")
        if thought:
            found.append(Piece(kind="thought", text=thought))
        logprobs = tuple((choice.get("logprobs") or {}).get("content") or ())
        if message.get("content") or logprobs:
            found.append(Piece(kind="text", text=message.get("content") or "", logprobs=logprobs))
        for i, call in enumerate(message.get("tool_calls") or ()):
            self.calls = True
            function = call.get("function") or {}
            found.append(
                Piece(
                    kind="call",
                    text=function.get("arguments") or "",
                    call=call.get("index", i),
                    call_id=call.get("id") or "",
                    name=function.get("name") or "",
                )
            )
        return found


def refuse(data: Mapping[str, Any], table: Mapping[str, str]) -> None:
    """Raises RequestError for a field that asks for what we cannot give; the table says why.

    Null, false and empty ask for nothing.
    """
    for name, why in table.items():
        if data.get(name):
            raise RequestError(f"{name} cannot be served: {why}.", param=name, code="unsupported")
