"""The routes, put together. In: the `Fleet`. Out: an ASGI application.

A new route is one line in `_SERVED`; the OpenAPI document reads the same list.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from tokenry.api import (
    absent,
    admin,
    batches_api,
    capabilities,
    embeddings,
    files_api,
    live,
    llama,
    messages_api,
    openapi,
    operate,
    page_file,
    pooling,
    rerank,
    responses_api,
    tgi,
    tokenize,
)
from tokenry.api.chat import chat_completions
from tokenry.api.completions import completions
from tokenry.api.desk import Desk
from tokenry.api.errors import on_http_exception, on_tokenry_error
from tokenry.api.fleet import Fleet
from tokenry.api.middleware import Faults
from tokenry.api.routes import Endpoint, get, post, routes_of
from tokenry.api.schema import REFUSED, ChatRequest, CompletionRequest
from tokenry.errors import TokenryError

_SERVED: tuple[Endpoint, ...] = (
    post("/v1/chat/completions", chat_completions, "Answer a chat.", ChatRequest, refused=REFUSED),
    post("/v1/completions", completions, "Continue prompts.", CompletionRequest, refused=REFUSED),
    get("/v1/models", operate.models, "The models served."),
    get("/v1/models/{id:path}", operate.model, "One model."),
    *responses_api.ENDPOINTS,
    *messages_api.ENDPOINTS,
    *tgi.ENDPOINTS,
    *llama.ENDPOINTS,
    *absent.ENDPOINTS,
    *embeddings.ENDPOINTS,
    *rerank.ENDPOINTS,
    *pooling.ENDPOINTS,
    *files_api.ENDPOINTS,
    *batches_api.ENDPOINTS,
    *admin.ENDPOINTS,
    post("/tokenize", tokenize.tokenize, "Token ids of a text or chat.", tokenize.Tokenize),
    post("/detokenize", tokenize.detokenize, "Text of token ids.", tokenize.Detokenize),
    get("/tokenizer_info", tokenize.tokenizer_info, "The tokenizer's special tokens and sizes."),
    get("/health", operate.readyz, "As /readyz."),
    get("/health/integrity", operate.integrity, "The engine checks its books."),
    get("/livez", operate.livez, "The process runs."),
    get("/readyz", operate.readyz, "Requests are served; 503 and why if not."),
    get("/metrics", operate.metrics, "Prometheus metrics.", kind="text/plain"),
    get("/version", operate.version, "The server's version."),
    *live.ENDPOINTS,
    get("/", page_file.page, "The page.", kind="text/html"),
)
ENDPOINTS = (*_SERVED, capabilities.endpoint(_SERVED), openapi.endpoint(_SERVED))


def make_app(fleet: Fleet, desk: Desk) -> ASGIApp:
    """All routes, with errors in their client's shape around them."""
    app = Starlette(
        routes=routes_of(ENDPOINTS),
        exception_handlers={
            TokenryError: on_tokenry_error,
            HTTPException: on_http_exception,
        },
        middleware=[Middleware(Faults)],
    )
    app.state.fleet = fleet
    app.state.service = fleet.first.service
    app.state.responses = desk.responses
    app.state.files = desk.files
    app.state.batches = desk.batches
    return app
