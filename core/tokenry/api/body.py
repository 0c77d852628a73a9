"""Reading a request's body: the right content type, not too large, JSON."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from tokenry.api.errors import HTTPError
from tokenry.api.service import service_of
from tokenry.api.wire import parse


async def read_json(request: Request) -> dict[str, Any]:
    """The body's object; 415, 413 or 400 if there is none."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPError(
            415,
            f"The content type is {kind or 'missing'!r}, it must be application/json.",
            mend="-H 'Content-Type: application/json'",
        )
    limit = service_of(request).config.max_body_bytes
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return parse(bytes(body))


def _too_large(limit: int) -> HTTPError:
    return HTTPError(
        413, f"The body is larger than {limit} bytes.", mend="--max-body-bytes N on the server"
    )
