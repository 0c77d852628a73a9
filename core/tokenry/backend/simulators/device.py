"""What all simulated devices share: a limited memory that is counted exactly, and no peeking in a
program.

Weights are counted as they stream into build_model, KV as it is allocated and freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokenry.backend.base import KV, Backend, ModelSpec, StepBatch, StepFn, WeightIter
from tokenry.backend.contract import KVSpec, MemoryInfo
from tokenry.backend.ops import OpTable
from tokenry.backend.simulators.faults import Faults
from tokenry.errors import BackendError, DeviceOOM

BATCH_TENSORS = (
    "token_ids",
    "positions",
    "slots",
    "q_start",
    "q_lens",
    "seq_lens",
    "block_table",
    "logit_rows",
)

HOST_READS: frozenset[Any] = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        "item",
        "tolist",
        "numpy",
        "nonzero",
        "is_nonzero",
        "equal",
        "allclose",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__contains__",
        "__array__",
    )
) | {torch.nonzero, torch.equal, torch.allclose, torch.is_nonzero}
"""Calls that make the host wait for a value (or whose shape depends on one)."""


def refuse_host_read(func: Any) -> None:
    """Raises BackendError if `func` would read a value of the device."""
    if func in HOST_READS:
        raise BackendError(
            f"{getattr(func, '__name__', func)}() inside a step waits for the device: "
            "only Backend.fetch may read values."
        )


class NoHostReads(TorchFunctionMode):
    """While it is on, no tensor shows its values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` unless it reads a value."""
        refuse_host_read(func)
        return func(*args, **(kwargs or {}))


class SimulatedDevice(Backend):
    """Counts its memory and its programs. `live_kv` maps a number per KV tensor to its bytes,
    `faults` says what goes wrong in service.
    """

    def __init__(self, memory_bytes: int) -> None:
        self.faults = Faults()
        self._total = memory_bytes
        self._weights = 0
        self._compiles = 0
        self._serial = 0
        self.live_kv: dict[int, int] = {}

    def memory(self) -> MemoryInfo:
        """Exactly what weights and KV hold."""
        used = self._weights + sum(self.live_kv.values())
        return MemoryInfo(total=self._total, free=self._total - used, used=used)

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """As the base class, within the memory; freed when the last reference goes."""
        need, free = num_blocks * spec.block_bytes, self.memory().free
        if need > free:
            raise DeviceOOM(
                f"{num_blocks} KV blocks need {need} bytes, {free} are free on the simulator.",
                mend="--backend-option memory=BYTES",
            )
        layers = [self.wrap(layer) for layer in super().alloc_kv(spec, num_blocks)]
        for layer in layers:
            self._serial += 1
            self.live_kv[self._serial] = layer.numel() * layer.element_size()
            weakref.finalize(layer, self.live_kv.pop, self._serial, None)
        return layers

    def wrap(self, layer: Tensor) -> Tensor:
        """A KV layer as this device shows it."""
        return layer

    def build_model(self, spec: ModelSpec, weights: WeightIter, ops: OpTable) -> StepFn:
        """The core's model; its weights count, and no step of it may read a value."""
        step = spec.torch_step(self._counted(weights), ops, self.caps)

        def guarded(batch: StepBatch, kv: KV) -> Tensor:
            self.faults.meet(batch)
            with NoHostReads():
                return step(batch, kv)

        return guarded

    def compile_count(self) -> int:
        """Programs made."""
        return self._compiles

    def _counted(self, weights: WeightIter) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            size = tensor.numel() * tensor.element_size()
            if size > self.memory().free:
                raise DeviceOOM(
                    f"Weight {name} needs {size} bytes, {self.memory().free} are free on the "
                    "simulator.",
                    mend="--backend-option memory=BYTES",
                )
            self._weights += size
            yield name, tensor


def tensors_of(batch: StepBatch) -> dict[str, Tensor]:
    """All tensors of a batch by name, `extra` among them."""
    named = {name: getattr(batch, name) for name in BATCH_TENSORS}
    return named | {f"extra.{name}": tensor for name, tensor in batch.extra.items()}


def map_tensors(batch: StepBatch, change: Callable[[Tensor], Tensor]) -> StepBatch:
    """The batch with every tensor changed."""
    changed: dict[str, Any] = {name: change(getattr(batch, name)) for name in BATCH_TENSORS}
    return replace(batch, extra={name: change(t) for name, t in batch.extra.items()}, **changed)
