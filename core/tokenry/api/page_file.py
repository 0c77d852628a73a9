"""The page at `/`: one document, put together once from the files in `page/`.

In: the package's own files. Out: HTML that loads nothing else, and a policy for the browser that
says so: its own script by hash, no other, and no server but this one. Knows no model.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

_SCRIPTS = ("base.js", "tokens.js", "chat.js", "live.js", "start.js")


@functools.cache
def document() -> tuple[str, dict[str, str]]:
    """The page and the headers that it is sent with."""
    folder = resources.files("tokenry.api").joinpath("page")

    def text(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    body = "\n".join(text(name) for name in _SCRIPTS)
    script = '"use strict";(() => {\n' + body + "})();"
    style = text("style.css")
    html = text("index.html").replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return html, {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


async def page(request: Request) -> Response:
    """The page."""
    html, headers = document()
    return HTMLResponse(html, headers=headers)
