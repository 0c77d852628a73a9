"""Which model a request is for: its body's `model`, before the route reads it.

In: an ASGI request. Out: the same request, with that model's service in its scope. With one model
nothing is read here. A model that sleeps is woken first, and the request waits for it.
"""

from __future__ import annotations

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenry.api.errors import error_response
from tokenry.api.fleet import Fleet, ServedModel
from tokenry.api.service import SERVICE
from tokenry.errors import TokenryError


class _Named(msgspec.Struct):
    """The one field of a body that says where it goes."""

    model: str | None = None


class Router:
    """Sends each POST with JSON to its model; everything else to the first."""

    def __init__(self, app: ASGIApp, *, fleet: Fleet) -> None:
        self._app = app
        self._fleet = fleet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with the service in the scope, or answer why not."""
        if scope["type"] != "http" or not _asks_a_model(scope):
            await self._app(scope, receive, send)
            return
        model = self._fleet.first
        try:
            if len(self._fleet) > 1:
                body = _Body(receive, self._fleet.first.service.config.max_body_bytes)
                model, receive = await self._pick(body, scope), body.replay
            if model.sleeps:
                await model.load()
        except TokenryError as error:
            await error_response(error, scope)(scope, receive, send)
            return
        scope[SERVICE] = model.service
        await self._app(scope, receive, send)

    async def _pick(self, body: _Body, scope: Scope) -> ServedModel:
        """The model that the body names; a body that cannot be read is the route's to refuse."""
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return self._fleet.first
        try:
            name = msgspec.json.decode(await body.read(), type=_Named).model
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            name = None
        return self._fleet.first if name is None else self._fleet.find(name)


def _asks_a_model(scope: Scope) -> bool:
    return scope["method"] == "POST" and not scope["path"].startswith("/admin/")


class _Body:
    """A request's messages, read once and told again."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._messages: list[Message] = []

    async def read(self) -> bytes:
        """The whole body; of one above the limit its beginning, the route refuses it."""
        parts, size = [], 0
        while size <= self._limit:
            message = await self._receive()
            self._messages.append(message)
            if message["type"] != "http.request":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if not message.get("more_body", False):
                break
        return b"".join(parts)

    async def replay(self) -> Message:
        """What was read, then what comes."""
        return self._messages.pop(0) if self._messages else await self._receive()
