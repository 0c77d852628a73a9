"""Routes of OpenAI's API that a text model cannot serve: a clear 400 instead of "no such route".

In: any request. Out: an error that names the model and what it cannot do.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from tokenry.api.routes import Handler, post
from tokenry.api.service import service_of
from tokenry.errors import RequestError

ABSENT = {
    "/v1/audio/speech": "speak",
    "/v1/audio/transcriptions": "hear",
    "/v1/audio/translations": "hear",
    "/v1/images/generations": "make images",
    "/v1/images/edits": "change images",
    "/v1/images/variations": "change images",
    "/v1/videos": "make videos",
    "/v1/moderations": "moderate",
}
"""Path -> what the model cannot do."""


def _refusal(what: str) -> Handler:
    async def refuse(request: Request) -> Response:
        name = service_of(request).model_names[0]
        raise RequestError(
            f"The model {name!r} is a text model: it cannot {what}.",
            param="model",
            code="unsupported",
            mend="GET /v1/capabilities says what it can",
        )

    return refuse


ENDPOINTS = tuple(
    post(path, _refusal(what), f"A 400: no model here can {what}.") for path, what in ABSENT.items()
)
