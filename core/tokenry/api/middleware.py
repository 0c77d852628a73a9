"""Around every request: its id, whether its key lets it in, and an answer when we fail. Plain ASGI,
so that streams pass untouched.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenry.api.caller import CALLER, Caller, targets_of
from tokenry.api.errors import HTTPError, error_response, fault_response
from tokenry.api.fleet import Fleet
from tokenry.api.keys import Key, KeyRing
from tokenry.api.limits import Account, Limits
from tokenry.api.router import Router
from tokenry.errors import TokenryError

PUBLIC = frozenset(("/", "/health", "/livez", "/readyz", "/version", "/metrics"))
"""Paths that need no key: they tell nothing of requests."""
ADMIN = "/admin"
"""Below it a key must be an admin's."""
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,256}")


def guarded(app: ASGIApp, fleet: Fleet) -> ASGIApp:
    """The application with all that stands before its routes; raises ConfigError for wrong keys."""
    service = fleet.first.service
    config = service.config
    ring = KeyRing(
        config.api_key,
        config.api_keys_file,
        admin_texts=config.admin_key,
        priorities=service.engine.config.scheduling_policy != "fcfs",
    )
    public = PUBLIC if config.public_metrics else PUBLIC - {"/metrics", "/version"}
    app = Router(app, fleet=fleet)
    app = Gate(app, ring=ring, limits=Limits(), public=public, refused=service.metrics.refused)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "openai-processing-ms", "x-ignored-params"],
        )
    return RequestId(app)


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
        scope["tokenry.request_id"] = name
        begun_s = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                headers["openai-processing-ms"] = str(int((time.monotonic() - begun_s) * 1000))
            await send(message)

        await self._app(scope, receive, send_with_id)


class Gate:
    """Lets a request in: 401 without one of the keys, 403 where the key must be an admin's, 429 for
    one who has had its share. OPTIONS and public paths pass.

    Everything that is asked of a key before the body is read is asked here; tokens are counted
    where they are known, in run.py.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        ring: KeyRing,
        limits: Limits,
        public: frozenset[str] = PUBLIC,
        refused: Callable[[TokenryError], None],
    ) -> None:
        self._app = app
        self._ring = ring
        self._limits = limits
        self._public = public
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with the caller set, or answer the error."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        account: Account | None = None
        try:
            sender = self._caller(scope, self._key(scope))
            if sender.account is not None and scope.get("method") == "POST":
                sender.account.begin()
                account = sender.account
        except TokenryError as error:
            self._refused(error)
            await _refuse(error, scope, receive, send)
            return
        token = CALLER.set(sender)
        try:
            await self._app(scope, receive, send)
        finally:
            CALLER.reset(token)
            if account is not None:
                account.end()

    def _key(self, scope: Scope) -> Key | None:
        """The key that lets it in; None where none is needed. Raises HTTPError."""
        path = scope["path"]
        admin = path == ADMIN or path.startswith(ADMIN + "/")
        verb = scope.get("method")  # POST / is TGI's, and no public page
        open_to_all = verb in ("GET", "HEAD") and path in self._public and not admin
        if verb == "OPTIONS" or open_to_all:
            return None
        text = _key_text(Headers(scope=scope))
        if admin:
            return self._admin(text)
        if not self._ring.asked_for:
            return None
        key = self._ring.find(text)
        if key is None:
            raise _no_key()
        return key

    def _admin(self, text: str) -> Key:
        key = self._ring.find(text)
        if key is not None and key.admin:
            return key
        if not any(k.admin for k in self._ring.keys):
            raise HTTPError(
                403,
                "This server has no admin key, so nobody may change its models.",
                code="no_admin_key",
                mend="--admin-key KEY, or `tokenry keys add NAME --admin`",
            )
        if key is None:
            raise _no_key()
        raise HTTPError(
            403, f"The key {key.name!r} is not an admin's.", code="insufficient_permissions"
        )

    def _caller(self, scope: Scope, key: Key | None) -> Caller:
        headers = Headers(scope=scope)
        return Caller(
            request_id=scope.get("tokenry.request_id", ""),
            traceparent=headers.get("traceparent", ""),
            account=None if key is None else self._limits.account(key),
            targets=targets_of(headers, key),
        )


def _key_text(headers: Headers) -> str:
    """What OpenAI's clients send, or Anthropic's."""
    scheme, _, text = headers.get("authorization", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _no_key() -> HTTPError:
    return HTTPError(
        401,
        "The API key is missing or wrong.",
        code="invalid_api_key",
        mend="Authorization: Bearer KEY",
    )


async def _refuse(error: TokenryError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()  # the handshake, which is answered by its refusal
        await send({"type": "websocket.close", "code": 1008, "reason": error.message})
        return
    await error_response(error, scope)(scope, receive, send)


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
