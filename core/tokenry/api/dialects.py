"""Whose manner of error a route keeps: OpenAI's, Anthropic's, Cohere's, or that of Hugging Face's
TGI.

In: an error and the request's verb and path. Out: the status and the JSON object that the client of
that route knows how to read.
"""

from __future__ import annotations

from typing import Any, Literal

from tokenry.errors import Overloaded, RequestError, TokenryError

Dialect = Literal["openai", "anthropic", "cohere", "tgi"]

_TGI = {"/generate", "/generate_stream", "/info", "/chat_tokenize"}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def dialect_of(verb: str, path: str) -> Dialect:
    """The dialect of a route; one that does not exist is OpenAI's."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    if path == "/v2/rerank":
        return "cohere"
    if path in _TGI or (verb == "POST" and path == "/"):
        return "tgi"
    return "openai"


def status_of(error: TokenryError, dialect: Dialect = "openai") -> int:
    """The status; TGI's clients know 422 for a wrong request and 429 for a full queue."""
    if dialect == "tgi":
        if error.status == 400:
            return 422
        if type(error) is Overloaded:
            return 429
    return error.status


def error_object(error: TokenryError, dialect: Dialect = "openai") -> dict[str, Any]:
    """The error as the dialect's clients read it.

    openai      {"error": {message, type, param, code}}
    anthropic   {"type": "error", "error": {type, message}}
    tgi         {"error": message, "error_type": ...}
    cohere      {"message": message}, and OpenAI's object beside it, which names the field
    """
    message = error.message if error.mend is None else f"{error.message} (Mend: {error.mend}.)"
    if dialect == "anthropic":
        kind = _ANTHROPIC_TYPES.get(error.status)
        if kind is None:
            kind = "api_error" if error.status >= 500 else "invalid_request_error"
        return {"type": "error", "error": {"type": kind, "message": message}}
    if dialect == "tgi":
        kind = "validation" if error.status < 500 else "generation"
        kind = "overloaded" if isinstance(error, Overloaded) else kind
        return {"error": message, "error_type": kind}
    param = error.param if isinstance(error, RequestError) else None
    openai = {"message": message, "type": error.type, "param": param, "code": error.code}
    return {"error": openai} if dialect == "openai" else {"message": message, "error": openai}
