"""uvicorn's HTTP, with a bound on a request's head and our error object where it has plain text.

In: bytes of a connection. Out: ASGI requests. uvicorn's httptools protocol stores headers without
end; here a head of more than MAX_HEAD_BYTES is answered with 431 and its connection is closed.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tokenry.api.dialects import error_object
from tokenry.api.errors import HTTPError

MAX_HEAD_BYTES = 64 * 1024
"""Most bytes of request line and headers; what one read gives beyond is dropped, too."""
_REASONS = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Feed the parser; end a connection whose head does not."""
        self._head_bytes += len(data)
        super().data_received(data)
        if not self._in_head:
            self._head_bytes = 0
        elif self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next thing is a head."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What the parser did not understand."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        body = msgspec.json.encode(error_object(HTTPError(status, message)))
        lines = [
            b"HTTP/1.1 %d %s" % (status, _REASONS[status]),
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
            b"",
            body,
        ]
        assert isinstance(self.transport, asyncio.Transport)
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()
