"""GET /live and /live/backends: what the server does now, for the page and for scripts.

In: the fleet, each engine's `Stats`, the front's histograms. Out: JSON of gauges, of counters that
only grow (a reader subtracts two answers and divides by their `now_s`), and of histograms' buckets.
Nothing of any request's text. The backends are probed once, in a process of their own: a plugin's
probe may load a driver, and this process must live through whatever it does.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tokenry.api.admin import fleet_of
from tokenry.api.errors import HTTPError
from tokenry.api.fleet import ServedModel
from tokenry.api.metrics import Histogram
from tokenry.api.operate import fresh_stats
from tokenry.api.routes import get
from tokenry.api.wire import JSON

_TIMES = {
    "ttft_s": "time_to_first_token_seconds",
    "itl_s": "inter_token_latency_seconds",
    "queue_s": "request_queue_time_seconds",
    "e2e_s": "e2e_request_latency_seconds",
}
_PROBE_PATIENCE_S = 60.0


async def live(request: Request) -> Response:
    """All models now."""
    fleet = fleet_of(request)
    await fresh_stats(fleet)
    models = [_model(model) for model in fleet]
    return JSON({"object": "live", "now_s": time.monotonic(), "models": models})


def _model(model: ServedModel) -> dict[str, Any]:
    service = model.service
    engine, stats = service.engine, service.engine.latest_stats
    told: dict[str, Any] = {
        "id": model.name,
        "state": model.state,
        "cause": str(engine.dead) if model.state == "dead" else service.stalled,
        "facts": None,
    }
    if engine.is_ready:
        ready = engine.ready
        told["facts"] = {
            "backend": ready.backend,
            "device": ready.device_name,
            "architecture": ready.architecture,
            "dtype": ready.dtype,
            "max_model_len": ready.max_model_len,
            "block_size": ready.block_size,
            "num_blocks": ready.num_blocks,
            "memory_bytes": ready.ledger,
            "notes": ready.notes,
        }
    metrics = service.metrics
    told["requests"] = {
        "queued": stats.num_waiting,
        "prefill": stats.num_prefilling,
        "decode": stats.num_running - stats.num_prefilling,
    }
    told["kv_usage"] = stats.kv_usage
    told["totals"] = {
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.generation_tokens,
        "prefix_cache_queries": stats.prefix_cache_queries,
        "prefix_cache_hits": stats.prefix_cache_hits,
        "preemptions": stats.num_preemptions,
        "steps": stats.steps,
        "step_failures": stats.step_failures,
        "finished": metrics.labelled["request_success"],
        "refused": metrics.labelled["requests_refused"],
    }
    told["times"] = {name: _times(metrics.histograms[own]) for name, own in _TIMES.items()}
    told["op_fallbacks"] = stats.op_fallbacks
    return told


def _times(histogram: Histogram) -> dict[str, Any]:
    """Upper bounds in seconds (the last, null, is infinite), and how many were at or below each."""
    bounds, counts = zip(*histogram.cumulative(), strict=True)
    finite: list[float | None] = [float(bound) for bound in bounds[:-1]]
    return {"bounds": [*finite, None], "counts": counts}


async def backends(request: Request) -> Response:
    """Every backend that this installation knows, with its device or the reason why not."""
    state = request.app.state
    if not hasattr(state, "backends"):
        state.backends = asyncio.create_task(_probed())
    try:
        rows = await asyncio.shield(state.backends)
    except (OSError, TimeoutError, msgspec.DecodeError) as error:
        del state.backends
        raise HTTPError(
            503, f"The backends could not be probed: {error}.", mend="tokenry doctor"
        ) from error
    return JSON({"object": "list", "data": rows})


async def _probed() -> Any:
    command = (sys.executable, "-m", "tokenry", "devices", "--all", "--json")
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), _PROBE_PATIENCE_S)
    finally:
        if process.returncode is None:
            process.kill()
    return msgspec.json.decode(out)


ENDPOINTS = (
    get("/live", live, "What every model does now: requests, blocks, counters, times."),
    get("/live/backends", backends, "The backends known here, with reasons."),
)
