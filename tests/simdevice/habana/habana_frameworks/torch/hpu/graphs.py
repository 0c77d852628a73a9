"""HPU graphs: capture, replay, and the wrapper that keeps one graph for each input signature.

As documented, graphs exist in lazy mode only, and a capture holds no host operation, no value or
shape read from the device and no write through a view. Tensors are keyed by their metadata, Python
scalars by value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from simdevice import VendorRefuses
from simdevice.graph import Graph
from torch.utils._pytree import tree_flatten


def _require_lazy() -> None:
    if os.environ.get("PT_HPU_LAZY_MODE", "0") != "1":
        raise VendorRefuses(
            "HPU graphs need lazy mode; mend: PT_HPU_LAZY_MODE=1 before torch loads"
        )


class HPUGraph:
    """capture_begin, capture_end, replay."""

    def __init__(self) -> None:
        _require_lazy()
        self._graph = Graph()

    def capture_begin(self, dry_run: bool = False) -> None:
        if dry_run:
            raise VendorRefuses("capture_begin(dry_run=True) is not simulated")
        self._graph.begin()

    def capture_end(self) -> None:
        self._graph.end()

    def replay(self, asynchronous: bool = False) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._graph.reset()


@contextmanager
def graph(hpu_graph: HPUGraph, stream: torch.Stream | None = None) -> Iterator[None]:
    """Captures the body into `hpu_graph`."""
    with hpu_graph._graph.capture():
        yield


def input_hash(obj: object) -> int:
    """Tensors by shape, stride, dtype and device; everything else by value."""
    leaves, spec = tree_flatten(obj)
    return hash((str(spec), *(_leaf_key(leaf) for leaf in leaves)))


def _leaf_key(leaf: object) -> object:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.device)
    try:
        hash(leaf)
    except TypeError:
        raise VendorRefuses(f"an HPU graph can't be keyed by a {type(leaf).__name__}") from None
    return (type(leaf), leaf)


class _Captured:
    """One graph with the tensors it was captured on and what it returned."""

    def __init__(self, run: Callable[..., object], args: tuple, kwargs: dict) -> None:
        self.inputs = _tensors((args, kwargs))
        self.graph = Graph()
        with self.graph.capture():
            self.outputs = run(*args, **kwargs)

    def replay(self, args: tuple, kwargs: dict) -> object:
        """Runs the graph on the given tensors' memory."""
        instead, copies = [], []
        for mine, given in zip(self.inputs, _tensors((args, kwargs)), strict=True):
            if mine.untyped_storage()._cdata == given.untyped_storage()._cdata:
                if mine.storage_offset() != given.storage_offset():
                    raise VendorRefuses("an input moved within the storage it was captured in")
            elif _replaces(mine, given):
                instead.append((mine, given))
            else:  # a part of a larger storage: through a stand-in of the captured one
                num_bytes = mine.untyped_storage().nbytes()
                whole = torch.empty(num_bytes, dtype=torch.uint8, device=mine.device)
                part = torch.empty(0, dtype=mine.dtype, device=mine.device)
                part.set_(whole.untyped_storage(), mine.storage_offset(), mine.shape, mine.stride())
                part.copy_(given)
                instead.append((mine, part))
                copies.append((given, part))
        self.graph.replay(instead)
        for given, part in copies:
            given.copy_(part)
        return self.outputs


def _tensors(obj: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(obj)[0] if isinstance(leaf, torch.Tensor)]


def _replaces(mine: torch.Tensor, given: torch.Tensor) -> bool:
    same_place = mine.storage_offset() == given.storage_offset()
    return same_place and mine.untyped_storage().nbytes() == given.untyped_storage().nbytes()


def wrap_in_hpu_graph(
    module: torch.nn.Module,
    asynchronous: bool = False,
    disable_tensor_cache: bool = False,
    dry_run: bool = False,
    max_graphs: int | None = None,
    verbose: bool = False,
) -> torch.nn.Module:
    """The module, whose forward captures once for each input signature and replays after that.

    `bypass_hpu_graphs=True` in a call runs it without a graph. Results live in the graph's memory:
    the next replay of the same signature overwrites them. With `max_graphs` reached, further
    signatures run without a graph.
    """
    _require_lazy()
    if dry_run:
        raise VendorRefuses("wrap_in_hpu_graph(dry_run=True) is not simulated")
    forward = module.forward
    graphs: dict[int, _Captured] = {}

    def wrapped(*args: object, bypass_hpu_graphs: bool = False, **kwargs: object) -> object:
        if bypass_hpu_graphs:
            return forward(*args, **kwargs)
        key = input_hash((args, kwargs))
        found = graphs.get(key)
        if found is None:
            if max_graphs is not None and len(graphs) >= max_graphs:
                return forward(*args, **kwargs)
            with torch.no_grad():
                found = graphs[key] = _Captured(forward, args, kwargs)
            return found.outputs
        return found.replay(args, kwargs)

    module.forward = wrapped
    module.clear_cache = graphs.clear
    return module
