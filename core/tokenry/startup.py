"""What every front tells its user of a start: how far it is, and what the engine became.

In: phases with their share, `Ready`. Out: lines on stderr. The server, the command line and the
Python API print the same ones, so that no fit, no fallback and no figure is known to one only.
Imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tokenry.messages import Progress, Ready

EVERY_S = 5.0
POLL_S = 0.05


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, nobody looks for cyclic garbage: a start makes 170,000 objects that all stay, most
    of them torch's, and looking through them again and again is a tenth of it.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            if not gc.get_freeze_count():
                gc.freeze()  # what is there counts as old, and is not
                gc.unfreeze()  # looked through as if it were new
            gc.enable()


def describe(ready: Ready) -> list[str]:
    """The model and its device, the ledger, what the KV cache holds, and every note."""
    ledger = ", ".join(f"{what} {in_units(size)}" for what, size in ready.ledger.items())
    tokens = (ready.num_blocks - 1) * ready.block_size  # block 0 holds nobody's tokens
    room = (
        f"KV cache for {tokens} tokens: {tokens / ready.max_model_len:.1f} requests of that "
        "length at once"
        if ready.num_blocks
        else "no KV cache: texts are read as a whole"
    )
    return [
        f"{ready.architecture} in {ready.dtype} on {ready.device_name} ({ready.backend})",
        f"memory: {ledger}" if ledger else "memory: not told by the backend",
        f"context {ready.max_model_len} tokens, {room}",
        *(f"note: {note}" for note in ready.notes),
    ]


def in_units(size: int) -> str:
    """Bytes as a person reads them."""
    units: list[tuple[str, int]] = [("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)]
    return next((f"{size / n:.1f} {unit}" for unit, n in units if size >= n), f"{size} B")


class StartLog:
    """Shows the phases of a start: on a terminal one line that changes, elsewhere a line when a
    phase begins and then one every EVERY_S seconds at most. `shown=False` says nothing at all.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._shown = shown
        self._clock = clock
        self._live = self._stream.isatty()
        self._phase = ""
        self._said_s = 0.0
        self._open = False

    def __call__(self, phase: str, share: float) -> None:
        """How far it is: `share` of `phase`, from 0 to 1."""
        if not self._shown:
            return
        text = f"  {phase} ... {share:.0%}" if 0 < share < 1 else f"  {phase} ..."
        if self._live:
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()
            self._open = True
        elif phase != self._phase or (0 < share < 1 and self._clock() - self._said_s >= EVERY_S):
            self._said_s = self._clock()
            self._write(text)
        self._phase = phase

    def say(self, *lines: str) -> None:
        """Whole lines, in the place of the one that changes."""
        if self._open:
            self._stream.write("\r\x1b[K")
            self._open = False
        if self._shown:
            for line in lines:
                self._write(line)

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


async def follow(
    log: StartLog, progress: Callable[[], Progress], *tasks: asyncio.Task[Any]
) -> None:
    """Show `progress` until the first of the tasks is done."""
    while not any(task.done() for task in tasks):
        await asyncio.wait(tasks, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
        now = progress()
        if now.phase != "ready":
            log(now.phase, now.share)
    log.say()
