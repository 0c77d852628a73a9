"""Whether the engine serves, told once as it changes.

In: the service, whose engine gives heartbeats. Out: lines of the log, and `Service.stalled` for
/readyz. A heartbeat comes from a thread of its own: a long step does not stop it, a process that
hangs or was stopped does. Requests are not failed by it: they wait until the engine answers again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tokenry.api.service import Service
from tokenry.config import ServerConfig

TICK_S = 1.0


async def watch(service: Service, say: Callable[[str], None]) -> None:
    """Until the engine's end, which is told, too."""
    engine = service.engine
    seen, silent_s = engine.pulse[0], 0.0
    while not await _ended_within(engine.ended, TICK_S):
        beats, step_s = engine.pulse
        # Counted in ticks: while this process was stopped itself, nobody was silent.
        silent_s = 0.0 if beats != seen else silent_s + TICK_S
        seen = beats
        cause = _cause(service.config, engine.pid, silent_s, step_s)
        if cause is not None and service.stalled is None:
            say(f"engine: {cause} /readyz answers 503, requests wait.")
        if cause is None and service.stalled is not None:
            say("engine: it answers again.")
        service.stalled = cause
    assert engine.dead is not None
    mend = "" if engine.dead.mend is None else f"\n  mend: {engine.dead.mend}"
    say(f"engine: {engine.dead.message} Requests are answered with 503 from now on.{mend}")


def _cause(config: ServerConfig, pid: int | None, silent_s: float, step_s: float) -> str | None:
    if silent_s >= config.heartbeat_timeout_s:
        return f"No sign of life of process {pid} for {config.heartbeat_timeout_s:g} s."
    if step_s >= config.step_timeout_s:
        return f"Process {pid} is in one step for more than {config.step_timeout_s:g} s."
    return None


async def _ended_within(ended: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await ended.wait()
    except TimeoutError:
        return False
