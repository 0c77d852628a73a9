"""GET /v1/capabilities: what each model on its backend can do, field by field, before it is asked.

In: the routes and the engines' own words. Out: one object per model. What is not in `fields` is
ignored and named in `x-ignored-params`; what is in `refused` is a 400.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import tokenry
from tokenry.api.absent import ABSENT
from tokenry.api.fleet import Fleet, ServedModel
from tokenry.api.routes import Endpoint, Handler, get
from tokenry.api.shape import SHAPES
from tokenry.api.wire import JSON
from tokenry.messages import RequestLimits

_OF_VECTORS = (
    "/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank",
    "/v2/rerank",
)  # fmt: skip
_OF_TEXT = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/", "/generate",
    "/generate_stream", "/completion",
)  # fmt: skip


def endpoint(others: Iterable[Endpoint]) -> Endpoint:
    """The route, which tells of the `others`."""
    asked = [e for e in others if e.verb == "POST" and e.body is not None and "{" not in e.path]
    return get("/v1/capabilities", _handler(asked), "What each model can do.")


def _handler(asked: list[Endpoint]) -> Handler:
    async def capabilities(request: Request) -> Response:
        fleet: Fleet = request.app.state.fleet
        config = fleet.first.service.config
        return JSON(
            {
                "object": "capabilities",
                "version": tokenry.__version__,
                "server": {
                    "strict_params": config.strict_params,
                    "files_and_batches": config.data_dir is not None,
                    "stored_responses": config.max_stored_responses,
                    "max_body_bytes": config.max_body_bytes,
                    "max_file_bytes": config.max_file_bytes,
                },
                "models": [_model(model, asked) for model in fleet],
            }
        )

    return capabilities


def _model(model: ServedModel, asked: list[Endpoint]) -> dict[str, Any]:
    engine = model.service.engine
    told: dict[str, Any] = {"id": model.name, "names": model.service.model_names}
    if not engine.is_ready:
        return {**told, "state": model.state, "backend": None, "endpoints": {}}
    ready = engine.ready
    limits = ready.limits
    return {
        **told,
        "state": model.state,
        "backend": ready.backend,
        "device": ready.device_name,
        "architecture": ready.architecture,
        "dtype": ready.dtype,
        "max_model_len": ready.max_model_len,
        "max_prompt_tokens": ready.max_model_len - 1,
        "max_top_k": limits.max_top_k,
        "priorities": limits.priorities,
        "generates": limits.tokens,
        "vectors": limits.vectors is not None,
        "logits_processors": limits.logits_processors,
        **_answers(model),
        "endpoints": {
            **{e.path: _endpoint(e, limits) for e in asked if e.path not in ABSENT},
            **{
                path: {"served": False, "why": f"a text model cannot {what}"}
                for path, what in ABSENT.items()
            },
        },
    }


def _answers(model: ServedModel) -> dict[str, Any]:
    """How the model calls tools and thinks, as the server reads it."""
    if not model.service.engine.ready.limits.tokens:
        return {"tool_parser": None, "reasoning_parser": None}
    form = model.service.answer_format
    thinks = None if form.reasoning is None else form.reasoning.name
    return {
        "tool_parser": form.tools.name,
        "reasoning_parser": form.tools.name if form.channels else thinks,
    }


def _endpoint(endpoint: Endpoint, limits: RequestLimits) -> dict[str, Any]:
    """Whether the model serves it, and with which fields."""
    if endpoint.path in _OF_TEXT and not limits.tokens:
        return {"served": False, "why": "this model gives vectors, not text"}
    if endpoint.path in _OF_VECTORS and limits.vectors is None:
        return {"served": False, "why": "this model gives text, not vectors"}
    if limits.vectors is not None:
        embeds = limits.vectors.kind == "embed"
        if endpoint.path == ("/classify" if embeds else "/v1/embeddings"):
            gives = "embeddings" if embeds else "scores or classes"
            return {"served": False, "why": f"this model gives {gives}"}
    names = list(limits.unserved)
    if "structured_outputs" in names:
        names += SHAPES
    unserved = dict.fromkeys(names, "the device, which draws by itself, cannot")
    fields = getattr(endpoint.body, "__struct_fields__", ())
    why = {name: text for name, text in endpoint.refused.items() if name not in fields}
    return {
        "served": True,
        "fields": sorted(set(fields) - set(unserved)),
        "refused": {**why, **{name: unserved[name] for name in fields if name in unserved}},
    }
