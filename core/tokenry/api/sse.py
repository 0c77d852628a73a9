"""Server-sent events: frames, keep-alive comments, and an end when the client goes.

In: an async iterator of JSON-like data (None: nothing to say, show life). Out: `text/event-stream`,
whose last event is `[DONE]`; an error in between becomes an event, since the status line is long
gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenry.api.errors import error_object
from tokenry.errors import TokenryError

log = logging.getLogger("tokenry.api")
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def frame(data: Any) -> bytes:
    """One event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class EventStream(Response):
    """Streams `events`; `at_end` is called in every case, also when the client goes."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Any, None],
        headers: dict[str, str],
        *,
        at_end: Callable[[], None],
    ) -> None:
        super().__init__(
            None, headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        )
        if "content-length" in self.headers:
            del self.headers["content-length"]
        self._events = events
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client is gone."""
        sending = asyncio.create_task(self._stream(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._at_end()
            leaving.cancel()
            sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._events.aclose()

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for event in self._events:
                await _send(send, KEEP_ALIVE if event is None else frame(event))
        except TokenryError as error:
            await _send(send, frame(error_object(error)))
        except Exception as error:  # the client must not wait for ever for a fault of ours
            log.exception("a stream failed")
            await _send(send, frame(error_object(TokenryError(f"{type(error).__name__}"))))
        await _send(send, DONE)
        await _send(send, b"", more=False)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
