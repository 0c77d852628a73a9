"""/admin/models: which models run; load, unload, sleep and wake them. Guarded by an admin's key,
see middleware.py.

In: a model's name, or the directory or hub id of a new one. Out: its state. An answer comes when
the model is there, or gone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tokenry.api.body import read_json
from tokenry.api.errors import HTTPError
from tokenry.api.fleet import Fleet, ServedModel
from tokenry.api.routes import get, post
from tokenry.api.schema import decode_known
from tokenry.api.wire import JSON
from tokenry.errors import ConfigError

ACTIONS = ("load", "unload", "sleep", "wake")


class NewModel(msgspec.Struct, frozen=True, kw_only=True):
    """POST /admin/models. `alias`: further names; the first model's options hold for it, too."""

    model: str
    alias: list[str] = []


def fleet_of(request: Request) -> Fleet:
    """The server's models."""
    fleet: Fleet = request.app.state.fleet
    return fleet


async def models(request: Request) -> Response:
    """All models, with what they do."""
    return JSON({"object": "list", "data": [describe(model) for model in fleet_of(request)]})


async def add(request: Request) -> Response:
    """One more model; it is loaded when the answer comes."""
    fleet = fleet_of(request)
    wanted, _ = decode_known(await read_json(request), NewModel, strict=True)
    config = dataclasses.replace(fleet.first.service.engine.config, model=wanted.model)
    try:
        model = fleet.add(config, (*wanted.alias, wanted.model))
    except ConfigError as error:
        raise HTTPError(409, error.message, code="model_exists", mend=error.mend) from error
    await model.load()
    return JSON(describe(model), status_code=201)


async def change(request: Request) -> Response:
    """One of the actions; an action that changes nothing is no error."""
    model = fleet_of(request).find(request.path_params["id"])
    action = request.path_params["action"]
    if action in ("load", "wake"):
        await model.load()
    elif action in ("unload", "sleep"):
        await model.unload(asleep=action == "sleep")
    else:
        raise HTTPError(
            404, f"There is no action {action!r}.", code="not_found", mend=", ".join(ACTIONS)
        )
    return JSON(describe(model))


def describe(model: ServedModel) -> dict[str, Any]:
    """A model as its admin sees it."""
    service = model.service
    progress = service.engine.progress
    return {
        "id": model.name,
        "object": "model",
        "names": list(service.model_names),
        "root": service.engine.config.model,
        "state": model.state,
        "phase": progress.phase if model.state == "loading" else None,
        "progress": progress.share if model.state == "loading" else None,
        "pid": service.engine.pid,
        "active": service.num_active,
    }


ENDPOINTS = (
    get("/admin/models", models, "All models and what they do."),
    post("/admin/models", add, "Serve one more model.", NewModel),
    post("/admin/models/{id:path}/{action}", change, "Load, unload, sleep or wake a model."),
)
