"""The routes, put together. In: a `Service`. Out: an ASGI application."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp

from tokenry.api import operate, tokenize
from tokenry.api.chat import chat_completions
from tokenry.api.completions import completions
from tokenry.api.errors import on_http_exception, on_tokenry_error
from tokenry.api.middleware import ApiKey, Faults, RequestId
from tokenry.api.service import Service
from tokenry.errors import TokenryError


def make_app(service: Service) -> ASGIApp:
    """All routes, with errors in OpenAI's shape around them."""
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", operate.models),
            Route("/v1/models/{id:path}", operate.model),
            Route("/tokenize", tokenize.tokenize, methods=["POST"]),
            Route("/detokenize", tokenize.detokenize, methods=["POST"]),
            Route("/tokenizer_info", tokenize.tokenizer_info),
            Route("/health", operate.readyz),
            Route("/health/integrity", operate.integrity),
            Route("/livez", operate.livez),
            Route("/readyz", operate.readyz),
            Route("/metrics", operate.metrics),
            Route("/version", operate.version),
            Route("/", operate.page),
        ],
        exception_handlers={
            TokenryError: on_tokenry_error,
            HTTPException: on_http_exception,
        },
        middleware=[Middleware(Faults)],
    )
    app.state.service = service
    return RequestId(ApiKey(app, keys=service.config.api_key))
