"""What operators ask: models, health, readiness, metrics and version."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

import tokenry
from tokenry.api.admin import fleet_of
from tokenry.api.errors import RETRY_AFTER_S
from tokenry.api.fleet import Fleet, ServedModel
from tokenry.api.service import service_of
from tokenry.api.wire import JSON
from tokenry.async_engine import AsyncEngine
from tokenry.errors import TokenryError

_WELL = ("ready", "sleeping", "unloaded")
_STATS_PATIENCE_S = 0.5
"""A step may take longer than a scraper waits; the last known stats are good enough then."""


async def models(request: Request) -> Response:
    """The names that requests may use, of all models that are not unloaded."""
    fleet = fleet_of(request)
    if len(fleet) == 1:
        fleet.first.service.check_alive()
    data = [
        _model(model, name)
        for model in fleet
        for name in model.service.model_names
        if model.state != "unloaded"
    ]
    return JSON({"object": "list", "data": data})


async def model(request: Request) -> Response:
    """One of them; ids may hold slashes."""
    name = request.path_params["id"]
    found = fleet_of(request).find(name)
    found.service.check_alive()
    return JSON(_model(found, name))


def _model(model: ServedModel, name: str) -> dict[str, Any]:
    service = model.service
    length = service.engine.ready.max_model_len if service.engine.is_ready else None
    return {
        "id": name,
        "object": "model",
        "created": service.started_s,
        "owned_by": "tokenry",
        "root": service.engine.config.model,
        "parent": None,
        "max_model_len": length,
        "state": model.state,
    }


async def livez(request: Request) -> Response:
    """The process runs: 200 from its first second."""
    return JSON({"status": "alive"})


async def readyz(request: Request) -> Response:
    """200 when requests are served, else 503 and why. Of several models each must serve, but for
    those that sleep or were unloaded.
    """
    fleet = fleet_of(request)
    states = [(model, _state(model)) for model in fleet]
    ill = [(model, state) for model, state in states if state["status"] not in _WELL]
    told: dict[str, Any] = (ill or states)[0][1]
    if len(fleet) > 1:
        told = {**told, "models": {model.name: state for model, state in states}}
        if ill:
            told["model"] = ill[0][0].name
        else:
            told["status"] = "ready"
    return _unready(told) if ill else JSON(told)


def _state(model: ServedModel) -> dict[str, Any]:
    service, state = model.service, model.state
    if state == "draining":
        return {"status": state, "active": service.num_active}
    if state == "dead":
        return {"status": state, "cause": str(service.engine.dead)}
    if state == "loading":
        progress = service.engine.progress
        return {"status": state, "phase": progress.phase, "progress": progress.share}
    if state == "stalled":
        return {"status": state, "cause": service.stalled}
    return {"status": state}


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
    fleet = fleet_of(request)
    await fresh_stats(fleet)
    return Response(fleet.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def fresh_stats(fleet: Fleet) -> None:
    """The stats of this moment, of every engine that answers in time."""
    await asyncio.gather(
        *(_fresh_stats(m.service.engine) for m in fleet if m.service.engine.is_ready)
    )


async def _fresh_stats(engine: AsyncEngine) -> None:
    with contextlib.suppress(TimeoutError, TokenryError):
        await asyncio.wait_for(engine.stats(), _STATS_PATIENCE_S)
