"""/v1/batches: create, get, list, cancel.

In: OpenAI's requests. Out: batch objects. `Filler` answers the lines through our own routes, when
live requests leave room.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from tokenry.api.answer import ignored_header
from tokenry.api.batch_lines import Line, Result, answer_line
from tokenry.api.batch_runner import BatchStore
from tokenry.api.body import read_json
from tokenry.api.caller import CALLER, Caller, caller
from tokenry.api.files_api import file_store
from tokenry.api.fleet import Fleet
from tokenry.api.inner import refuse
from tokenry.api.owned import shown, visible
from tokenry.api.paging import QUERY, page
from tokenry.api.routes import get, post
from tokenry.api.schema import decode_known
from tokenry.api.service import service_of
from tokenry.api.wire import JSON
from tokenry.errors import RequestError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""Routes that a batch may ask, where they are served."""
LIVE_SHARE = 0.5
"""Lines start only while less than this share of a step's requests is taken: those that run would
be preempted for live ones anyway, and what they computed is lost then.
"""


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None


class Filler:
    """Answers a batch's lines behind live requests."""

    def __init__(self, app: ASGIApp, fleet: Fleet) -> None:
        self._app = app
        self._fleet = fleet

    async def answer(self, line: Line, owner: str | None) -> Result:
        """The answer to a line of this owner's batch. Runs in a task of its own."""
        CALLER.set(Caller(on_behalf_of=owner, filler=True))
        return await answer_line(self._app, line)

    def has_room(self) -> bool:
        """Whether nobody waits, and less than LIVE_SHARE of every engine is taken."""
        for model in self._fleet:
            engine = model.service.engine
            if not engine.is_ready:
                continue
            most = max(1, int(engine.config.max_num_seqs * LIVE_SHARE))
            if engine.num_completions >= most or engine.latest_stats.num_waiting > 0:
                return False
        return True


async def create(request: Request) -> Response:
    """POST /v1/batches."""
    files, store = file_store(request), batch_store(request)
    data = await read_json(request)
    refuse(data, {"output_expires_after": "output files are kept until they are deleted"})
    strict = service_of(request).config.strict_params
    meaningless = ("output_expires_after",)
    wanted, unknown = decode_known(data, BatchRequest, strict=strict, meaningless=meaningless)
    served = {getattr(route, "path", "") for route in request.app.routes}
    urls = [url for url in URLS if url in served]
    if wanted.endpoint not in urls:
        raise RequestError(
            f"endpoint is {wanted.endpoint!r}, it must be one of {', '.join(urls)}.",
            param="endpoint",
        )
    if wanted.completion_window != "24h":
        raise RequestError("completion_window must be 24h.", param="completion_window")
    try:
        found = files.get(wanted.input_file_id)
    except RequestError as error:
        raise RequestError(error.message, param="input_file_id", code=error.code) from error
    if found["purpose"] != "batch":
        raise RequestError(
            f"The file's purpose is {found['purpose']!r}, it must be 'batch'.",
            param="input_file_id",
        )
    batch = await store.create(
        input_file_id=wanted.input_file_id,
        endpoint=wanted.endpoint,
        metadata=wanted.metadata,
        owner=caller().owner,
    )
    return JSON(shown(batch), headers=ignored_header(unknown))


async def retrieve(request: Request) -> Response:
    """GET /v1/batches/{id}."""
    return JSON(shown(batch_store(request).get(request.path_params["id"])))


async def list_batches(request: Request) -> Response:
    """GET /v1/batches."""
    return JSON(page(request, visible(batch_store(request).all())))


async def cancel(request: Request) -> Response:
    """POST /v1/batches/{id}/cancel."""
    batch: dict[str, Any] = await batch_store(request).cancel(request.path_params["id"])
    return JSON(shown(batch))


def batch_store(request: Request) -> BatchStore:
    """The server's batches; raises RequestError if it has no directory for them."""
    file_store(request)
    store: BatchStore = request.app.state.batches
    return store


ENDPOINTS = (
    post("/v1/batches", create, "Run a file of requests behind live ones.", BatchRequest),
    get("/v1/batches", list_batches, "The key's batches.", query=QUERY),
    get("/v1/batches/{id}", retrieve, "One batch."),
    post("/v1/batches/{id}/cancel", cancel, "End a batch; what is done stays."),
)
