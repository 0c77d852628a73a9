"""Server-sent events: frames, keep-alive comments, and an end when the client goes.

In: an async iterator of JSON-like data (None: nothing to say, show life). Out: `text/event-stream`
in the manner of the route's clients (OpenAI's last event is `[DONE]`); an error in between becomes
an event, since the status line is long gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenry.api.dialects import Dialect, error_object
from tokenry.errors import TokenryError

log = logging.getLogger("tokenry.api")
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def frame(data: Any) -> bytes:
    """One event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def named_frame(data: Any) -> bytes:
    """One event under the name that its `type` is."""
    name: str = data["type"]
    return b"event: " + name.encode() + b"\n" + frame(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a stream's events are framed.

    end     what comes after the last event.
    alive   what shows life in a silence.
    dialect whose error object a failure is.
    """

    frame: Callable[[Any], bytes] = frame
    end: bytes = DONE
    alive: bytes = KEEP_ALIVE
    dialect: Dialect = "openai"


CHUNKS = Manner()
"""OpenAI's chat and completions."""
EVENTS = Manner(frame=named_frame, end=b"")
"""OpenAI's responses."""
MESSAGES = Manner(
    frame=named_frame,
    end=b"",
    alive=b'event: ping\ndata: {"type": "ping"}\n\n',
    dialect="anthropic",
)
"""Anthropic's messages."""
TOKENS = Manner(end=b"", dialect="tgi")
"""TGI's generate_stream."""


class EventStream(Response):
    """Streams `events`; `at_end` is called in every case, also when the client goes.

    Another dialect's stream takes `events` and `at_end` over and tells them in its own manner.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Any, None],
        headers: dict[str, str],
        *,
        at_end: Callable[[], None],
        manner: Manner = CHUNKS,
    ) -> None:
        super().__init__(
            None, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        )
        if "content-length" in self.headers:
            del self.headers["content-length"]
        self.events = events
        self.at_end = at_end
        self._manner = manner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client is gone."""
        sending = asyncio.create_task(self._stream(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.at_end()
            leaving.cancel()
            sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self.events.aclose()

    async def _stream(self, send: Send) -> None:
        manner = self._manner
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for event in self.events:
                await _send(send, manner.alive if event is None else manner.frame(event))
        except TokenryError as error:
            await _send(send, self._failure(error))
        except Exception as error:  # the client must not wait for ever for a fault of ours
            log.exception("a stream failed")
            await _send(send, self._failure(TokenryError(f"{type(error).__name__}")))
        await _send(send, manner.end, more=False)

    def _failure(self, error: TokenryError) -> bytes:
        data = error_object(error, self._manner.dialect)
        if self._manner is EVENTS:
            data = {"type": "error", **data["error"]}
        return self._manner.frame(data)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
