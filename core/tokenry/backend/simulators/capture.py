"""sim-cuda: dynamic shapes; a compiled program is a recording that is replayed at fixed addresses.

A replay copies the batch into the buffers of the recording and overwrites the recording's one
output. What a real recording forbids raises BackendError: another shape, memory allocated while it
runs, KV that was freed since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from tokenry.backend.base import KV, Op, Program, StepBatch
from tokenry.backend.contract import Caps, KVSpec
from tokenry.backend.simulators.device import NoHostReads, SimulatedDevice, map_tensors, tensors_of
from tokenry.backend.simulators.rowwise import rowwise_ops
from tokenry.errors import BackendError


class SimCapture(SimulatedDevice):
    """Capture and replay."""

    caps = Caps(
        dtypes=("float32", "bfloat16", "float16"),
        block_sizes=(16, 32),
        graphs="capture",
        invariant_option="deterministic=true",
    )

    def __init__(self, memory_bytes: int, *, deterministic: bool = False) -> None:
        super().__init__(memory_bytes)
        self._recording = False
        if deterministic:
            self.caps = replace(self.caps, batch_invariant=True)

    def ops(self) -> Mapping[str, Op]:
        """The reference ops; in the deterministic mode row by row."""
        return rowwise_ops() if self.caps.batch_invariant else {}

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """As any device, but never inside a recording."""
        if self._recording:
            raise BackendError("KV was allocated while a program was recorded or replayed.")
        return super().alloc_kv(spec, num_blocks)

    def compile(self, step: Program, example: StepBatch) -> Program:
        """Record `step` on buffers of its own."""
        self._compiles += 1
        buffers = map_tensors(example, Tensor.clone)
        slots = tensors_of(buffers)
        addresses = {name: tensor.data_ptr() for name, tensor in slots.items()}
        output = self._run(step, buffers).clone()
        kv_used = frozenset(self.live_kv)

        def replay(batch: StepBatch) -> Tensor:
            if batch.bucket != example.bucket:
                raise BackendError(f"A program for {example.bucket} was given {batch.bucket}.")
            given = tensors_of(batch)
            if given.keys() != slots.keys():
                raise BackendError(f"A program for {sorted(slots)} was given {sorted(given)}.")
            for name, slot in slots.items():
                if given[name].shape != slot.shape or given[name].dtype != slot.dtype:
                    raise BackendError(
                        f"{name} was recorded as {list(slot.shape)} {slot.dtype}, replayed with "
                        f"{list(given[name].shape)} {given[name].dtype}."
                    )
                slot.copy_(given[name])
                if slot.data_ptr() != addresses[name]:
                    raise BackendError(f"{name} moved since it was recorded.")
            if not kv_used <= self.live_kv.keys():
                raise BackendError("KV that a program was recorded with has been freed.")
            output.copy_(self._run(step, buffers))
            return output

        return replay

    def _run(self, step: Program, batch: StepBatch) -> Tensor:
        self._recording = True
        try:
            with NoHostReads():
                return step(batch)
        finally:
            self._recording = False
