"""Graph capture and replay, as stand-ins of vendors' graph objects use it.

In: code run between begin and end. Out: `Graph.replay`, which runs the recorded calls on the
recorded memory, or on other memory for some storages. Knows nothing of vendors' names.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence

import torch

from simdevice.device import current, refusals_typed


class Graph:
    """One captured graph. It keeps its intermediates' memory until `reset` or its end."""

    def __init__(self) -> None:
        self._device = current()
        self._id = 0

    def begin(self) -> None:
        """Starts recording this thread's calls. Raises NewProgram when strict."""
        self.reset()
        self._id = self._device.library.call("capture_begin")
        self._device.library.call("in_program", 1)

    def end(self, *, keep: bool = True) -> int:
        """Stops recording; the number of recorded calls."""
        self._device.library.call("in_program", -1)
        num_calls = self._device.library.call("capture_end", keep)
        if not keep:
            self._id = 0
        return num_calls

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Records the body; a body that raises leaves no graph. Raises NotCapturable."""
        self.begin()
        done = False
        try:
            with refusals_typed():
                yield
            done = True
        finally:
            self.end(keep=done)

    def replay(self, instead: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()) -> None:
        """Runs the recorded calls; each pair's second tensor's storage is used for the first's."""
        addresses = [t.untyped_storage()._cdata for pair in instead for t in pair]
        array = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        self._device.library.call("replay", self._id, len(instead), array)

    def reset(self) -> None:
        """Frees the graph's memory; it can be captured again."""
        if self._id:
            self._device.library.call("free_graph", self._id)
            self._id = 0

    def __del__(self) -> None:
        self.reset()
