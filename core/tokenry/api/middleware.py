"""Around every request: its id, whether its key lets it in, and an answer when we fail. Plain ASGI,
so that streams pass untouched.
"""

from __future__ import annotations

import hmac
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenry.api.errors import HTTPError, error_response, fault_response

PUBLIC = frozenset(("/", "/health", "/livez", "/readyz", "/version", "/metrics"))
"""Paths that need no key: they tell nothing of requests."""
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,256}")


class RequestId:
    """`x-request-id` in every answer: the client's own, if it sent one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; add headers to the answer's start."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _SAFE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        begun_s = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                headers["openai-processing-ms"] = str(int((time.monotonic() - begun_s) * 1000))
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKey:
    """401 for a request without one of the keys; OPTIONS and public paths pass."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401."""
        open_to_all = (
            not self._keys
            or scope["type"] != "http"
            or scope["method"] == "OPTIONS"
            or scope["path"] in PUBLIC
        )
        if open_to_all or self._known(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = HTTPError(
            401,
            "The API key is missing or wrong.",
            code="invalid_api_key",
            mend="Authorization: Bearer KEY",
        )
        await error_response(error, scope)(scope, receive, send)

    def _known(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # Every key is compared, so that time tells nothing.
        return any([hmac.compare_digest(given.encode(), key) for key in self._keys])  # noqa: C419


class Faults:
    """A fault of ours is a 500 in OpenAI's shape, and the connection lives on.

    Starlette's own layer for it raises again after its answer, which makes uvicorn cut the
    connection under the client's next request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; answer what went wrong before the answer began."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except ClientDisconnect:
            return  # it went while it sent its body: nobody is there to be told
        except Exception as error:  # whatever it is, its sender must learn of it
            if begun:
                raise
            await fault_response(scope, error)(scope, receive, send)
