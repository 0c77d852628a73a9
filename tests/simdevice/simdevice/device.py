"""The simulated device of this process: memory, counts, guarded regions, strictness.

In: a name and the environment's settings. Out: `Device`, one per process, made by `attach` (which a
stand-in package calls when torch loads it). Knows no vendor beyond the three names that torch
itself treats differently.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from simdevice.build import library
from simdevice.errors import NewProgram, NoDevice, Refused, typed
from simdevice.native import Library

DEFAULT_MEMORY = 2 << 30


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of device memory; exact, of live storages."""

    limit_bytes: int
    allocated_bytes: int
    peak_bytes: int
    num_allocations: int

    @property
    def free_bytes(self) -> int:
        """What may still be allocated."""
        return self.limit_bytes - self.allocated_bytes


@dataclass(frozen=True, slots=True)
class Counts:
    """What happened since `reset_counts`.

    `loose_kernels` ran outside any program or replay; `cached_programs` of `programs` were found in
    a compiler's cache on disk; `view_writes` are writes in place through a view.
    """

    kernels: int
    loose_kernels: int
    scalar_reads: int
    shape_reads: int
    copies_to_host: int
    async_copies_to_host: int
    copies_to_device: int
    waited_copies_to_device: int
    programs: int
    cached_programs: int
    recipes: int
    captures: int
    replays: int
    view_writes: int

    @property
    def host_syncs(self) -> int:
        """Waits of the host: scalar reads, blocking copies, shapes that depend on values."""
        waited = self.copies_to_host + self.waited_copies_to_device
        return self.scalar_reads + self.shape_reads + waited

    @property
    def compilations(self) -> int:
        """Everything that costs a compilation: programs not cached, recipes and captures."""
        return self.programs - self.cached_programs + self.recipes + self.captures


@contextlib.contextmanager
def refusals_typed() -> Iterator[None]:
    """Raises the library's tagged RuntimeErrors as their types."""
    try:
        yield
    except RuntimeError as error:
        refusal = typed(error)
        if refusal is None:
            raise
        raise refusal from error


class Device:
    """One simulated device. Owned by the process; made once by `attach`."""

    def __init__(self, name: str, memory: int, *, promote: bool, lazy: bool) -> None:
        self.name = name
        self.lazy = lazy
        self.library = Library(library())
        kind = name if name in ("hpu", "cuda") else "privateuse1"
        self.library.call("start", kind.encode(), name.encode())
        self.library.call("options", promote, lazy, name != "hpu")
        self.library.call("set_limit", memory)
        self._lock = threading.Lock()
        self._programs = self._cached_programs = 0
        self.strict_now = False

    def memory(self) -> Memory:
        """Bytes now, at the peak, and in all."""
        now = self.library.counters()
        return Memory(now["limit"], now["allocated"], now["peak"], now["allocations"])

    def set_memory_limit(self, limit_bytes: int) -> None:
        """Allocations beyond it raise torch.OutOfMemoryError."""
        self.library.call("set_limit", limit_bytes)

    def reset_peak(self) -> None:
        """The peak becomes what is allocated now."""
        self.library.call("reset_peak")

    def counts(self) -> Counts:
        """What happened since `reset_counts` (or the start)."""
        now = self.library.counters()
        now |= {"programs": self._programs, "cached_programs": self._cached_programs}
        return Counts(**{key: now[key] for key in Counts.__dataclass_fields__})

    def reset_counts(self) -> None:
        """All counts (not memory) start again from 0."""
        self.library.call("reset_counters")
        self._programs = self._cached_programs = 0

    def kernel_counts(self) -> dict[str, int]:
        """How often each operator ran, by `aten::name.overload`."""
        return self.library.kernel_counts()

    def synchronize(self) -> None:
        """All asynchronous copies to the host have arrived."""
        self.library.call("synchronize")

    def mark_step(self) -> None:
        """Closes the recipe of lazy mode. Raises NewProgram for an unknown one when strict."""
        self.library.call("flush_recipe")

    def strict(self) -> None:
        """From here on a new recipe, capture or program raises NewProgram (see the README)."""
        self.mark_step()
        self.strict_now = True
        self.library.call("set_strict", True)

    def relax(self) -> None:
        """New programs are allowed again."""
        self.strict_now = False
        self.library.call("set_strict", False)

    def note_program(self, what: str, *, cached: bool = False) -> None:
        """Counts a program that a dynamo backend made. Raises NewProgram when strict."""
        if self.strict_now:
            raise NewProgram(f"{what} was compiled after strict() was called")
        with self._lock:
            self._programs += 1
            self._cached_programs += cached

    @contextlib.contextmanager
    def no_host_sync(self) -> Iterator[None]:
        """Where this thread must not wait for the device: doing so raises HostSync."""
        self.library.call("forbid_sync", 1)
        try:
            with refusals_typed():
                yield
        finally:
            self.library.call("forbid_sync", -1)

    @contextlib.contextmanager
    def program(self) -> Iterator[None]:
        """A compiled program runs: kernels are not loose, and it can't wait for the host."""
        self.library.call("in_program", 1)
        try:
            with self.no_host_sync():
                yield
        finally:
            self.library.call("in_program", -1)


_attached: list[Device] = []  # one at most: a process has one simulated device


def attach(name: str) -> Device:
    """The device of this process, made from the environment at the first call.

    A stand-in package calls it when torch loads it. Raises Refused if the process has another.
    """
    if not _attached:
        memory = int(os.environ.get("SIMDEVICE_MEMORY", DEFAULT_MEMORY))
        promote = os.environ.get("SIMDEVICE_DTYPES", "refuse") == "promote"
        lazy = name == "hpu" and os.environ.get("PT_HPU_LAZY_MODE", "0") == "1"
        _attached.append(Device(name, memory, promote=promote, lazy=lazy))
    if _attached[0].name != name:
        raise Refused(f"this process already has the simulated device {_attached[0].name}")
    return _attached[0]


def current() -> Device:
    """The device of this process. Raises NoDevice."""
    if not _attached:
        raise NoDevice(
            "this process has no simulated device; mend: simdevice.install(name), or start the "
            "process with simdevice.environment(name)"
        )
    return _attached[0]
