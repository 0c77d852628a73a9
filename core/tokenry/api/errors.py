"""Every error as its route's error object, with the status and headers that its clients obey.

In: exceptions. Out: JSON responses, or the data of a server-sent event where a stream has begun.
"""

from __future__ import annotations

import logging
import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Scope

from tokenry.api.dialects import dialect_of, error_object, status_of
from tokenry.api.limits import QuotaExceeded
from tokenry.api.wire import JSON
from tokenry.errors import Overloaded, RequestError, TokenryError

log = logging.getLogger("tokenry.api")
RETRY_AFTER_S = 2


class NotReady(Overloaded):
    """The model is still loading, or the server drains."""

    code = "not_ready"


class HTTPError(RequestError):
    """A request that is wrong as HTTP: content type, size, route, verb, key."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, mend: str | None = None
    ) -> None:
        super().__init__(message, code=code, mend=mend)
        self.status = status


def error_response(error: TokenryError, scope: Scope | None = None) -> JSON:
    """The answer to a request that failed, in the manner of the scope's route."""
    dialect = "openai" if scope is None else dialect_of(scope["method"], scope["path"])
    status = status_of(error, dialect)
    headers: dict[str, str] = {}
    if isinstance(error, QuotaExceeded) and error.retry_after_s is None:
        headers["x-should-retry"] = "false"  # openai's clients obey it
    elif status in (429, 503):
        wait_s = error.retry_after_s if isinstance(error, QuotaExceeded) else RETRY_AFTER_S
        headers["retry-after"] = str(math.ceil(wait_s or 0))
        headers["retry-after-ms"] = str(math.ceil((wait_s or 0) * 1000))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSON(error_object(error, dialect), status_code=status, headers=headers)


async def on_tokenry_error(request: Request, error: Exception) -> JSON:
    """An error that we raise on purpose."""
    assert isinstance(error, TokenryError)
    return error_response(error, request.scope)


async def on_http_exception(request: Request, error: Exception) -> JSON:
    """Starlette's own: no such route, wrong verb."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    text = {404: f"There is no route {where}.", 405: f"{where}: this method is not allowed."}
    message = text.get(error.status_code, str(error.detail))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    response = error_response(HTTPError(error.status_code, message, code=code), request.scope)
    response.headers.update(error.headers or {})
    return response


def fault_response(scope: Scope, error: Exception) -> JSON:
    """A fault of ours: the sender is told, the log has the trace."""
    log.exception("%s %s failed", scope["method"], scope["path"], exc_info=error)
    return error_response(TokenryError(f"The server failed: {type(error).__name__}."), scope)
