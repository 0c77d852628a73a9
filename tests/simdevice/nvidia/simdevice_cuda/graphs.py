"""CUDA graphs as code uses them: capture on fixed tensors, replay on the same memory.

What a real capture refuses and is refused here: reading a value, a shape that depends on values,
copies from or to the host. Unlike the real one, a capture also executes. Pools and streams are
taken and mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import simdevice
import torch
from simdevice.graph import Graph


class CUDAGraph:
    """capture_begin, capture_end, replay, reset, pool."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._graph = Graph()

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        self._graph.begin()

    def capture_end(self) -> None:
        self._graph.end()

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._graph.reset()

    def pool(self) -> tuple[int, int]:
        return (0, 0)


@contextmanager
def graph(
    cuda_graph: CUDAGraph,
    pool: object = None,
    stream: torch.Stream | None = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """Captures the body into `cuda_graph`."""
    with cuda_graph._graph.capture():
        yield


def graph_pool_handle() -> tuple[int, int]:
    """A handle for a memory pool; there is one memory."""
    return (0, 0)


def is_capturing() -> bool:
    """Whether this thread records."""
    return simdevice.current().library.call("capturing") == 1
