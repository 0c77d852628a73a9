"""The library's C interface as Python functions.

In: the path from build.py. Out: `Library`, whose calls raise instead of returning -1. Owned by
Device.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

from simdevice.errors import typed

COUNTERS = (
    "limit", "allocated", "peak", "allocations", "kernels", "loose_kernels", "scalar_reads",
    "shape_reads", "copies_to_host", "async_copies_to_host", "copies_to_device",
    "waited_copies_to_device", "recipes",
    "captures", "replays", "view_writes",
)  # fmt: skip


class Library:
    """The loaded library. `call(name, *args)` is an int; text comes from `kernel_counts`."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        self._lib.simdevice_error.restype = ctypes.c_char_p
        self._lib.simdevice_kernel_counts.restype = ctypes.c_char_p
        self._signature("start", [ctypes.c_char_p, ctypes.c_char_p])
        self._signature("options", [ctypes.c_bool] * 3, returns=False)
        self._signature("set_strict", [ctypes.c_bool], returns=False)
        self._signature("capture_end", [ctypes.c_bool])
        for name in ("set_limit", "forbid_sync", "in_program", "free_graph"):
            self._signature(name, [ctypes.c_int64], returns=False)
        for name in ("reset_peak", "synchronize", "reset_counters"):
            self._signature(name, [], returns=False)
        for name in ("flush_recipe", "capture_begin", "capturing"):
            self._signature(name, [])
        self._signature("replay", [ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p])
        self._signature("counters", [ctypes.c_int64 * len(COUNTERS)], returns=False)

    def _signature(self, name: str, args: list[type], *, returns: bool = True) -> None:
        function = self._lib[f"simdevice_{name}"]
        function.argtypes = args
        function.restype = ctypes.c_int64 if returns else None
        setattr(self, f"_{name}", function)

    def call(self, name: str, *args: object) -> int:
        """Run one function. Raises RuntimeError (typed by its tag) with the library's text."""
        result = getattr(self, f"_{name}")(*args)
        if result == -1:
            error = RuntimeError(self._lib.simdevice_error().decode())
            raise typed(error) or error
        return 0 if result is None else int(result)

    def counters(self) -> dict[str, int]:
        """All counters by name."""
        values = (ctypes.c_int64 * len(COUNTERS))()
        self.call("counters", values)
        return dict(zip(COUNTERS, values, strict=True))

    def kernel_counts(self) -> dict[str, int]:
        """Number of runs by operator name."""
        lines = self._lib.simdevice_kernel_counts().decode().splitlines()
        return {name: int(count) for name, count in (line.rsplit(" ", 1) for line in lines)}
