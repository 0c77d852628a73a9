"""What operators ask: models, health, readiness, metrics, version, and the page."""

from __future__ import annotations

import asyncio
import contextlib
from importlib import resources
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

import tokenry
from tokenry.api.errors import RETRY_AFTER_S
from tokenry.api.service import Service, service_of
from tokenry.api.wire import JSON
from tokenry.errors import TokenryError

_STATS_PATIENCE_S = 0.5
"""A step may take longer than a scraper waits; the last known stats are good enough then."""


async def models(request: Request) -> Response:
    """The names that requests may use."""
    service = service_of(request)
    service.check_alive()
    data = [_model(service, name) for name in service.model_names]
    return JSON({"object": "list", "data": data})


async def model(request: Request) -> Response:
    """One of them; ids may hold slashes."""
    service = service_of(request)
    service.check_alive()
    return JSON(_model(service, service.check_model(request.path_params["id"])))


def _model(service: Service, name: str) -> dict[str, Any]:
    length = service.engine.ready.max_model_len if service.engine.is_ready else None
    return {
        "id": name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "tokenry",
        "root": service.engine.config.model,
        "parent": None,
        "max_model_len": length,
    }


async def livez(request: Request) -> Response:
    """The process runs: 200 from its first second."""
    return JSON({"status": "alive"})


async def readyz(request: Request) -> Response:
    """200 when requests are served, else 503 and why."""
    service = service_of(request)
    engine = service.engine
    progress = engine.progress
    if service.draining:
        return _unready({"status": "draining", "active": service.num_active})
    if engine.dead is not None:
        return _unready({"status": "dead", "cause": str(engine.dead)})
    if not engine.is_ready:
        state = {"status": "loading", "phase": progress.phase, "progress": progress.share}
        return _unready(state)
    if service.stalled is not None:
        return _unready({"status": "stalled", "cause": service.stalled})
    return JSON({"status": "ready"})


def _unready(state: dict[str, Any]) -> Response:
    return JSON(state, status_code=503, headers={"retry-after": str(RETRY_AFTER_S)})


async def integrity(request: Request) -> Response:
    """The engine checks its books (blocks, reference counts) and says so."""
    await service_of(request).engine.check_integrity()
    return JSON({"ok": True})


async def version(request: Request) -> Response:
    """Ours."""
    return JSON({"version": tokenry.__version__})


async def metrics(request: Request) -> Response:
    """Prometheus' text, with the engine's stats of this moment where it answers in time."""
    service = service_of(request)
    if service.engine.is_ready:
        with contextlib.suppress(TimeoutError, TokenryError):
            await asyncio.wait_for(service.engine.stats(), _STATS_PATIENCE_S)
    return Response(service.all_metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def page(request: Request) -> Response:
    """The chat page."""
    html = resources.files("tokenry.api").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(html)
