"""The Acme device: what it can do, its memory, its programs; its kernels are in `ops.py`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tokenry.backend.base import KV, Backend, ModelSpec, Op, Program, StepBatch, StepFn, WeightIter
from tokenry.backend.contract import Caps, KVPlan, KVSpec, MemoryInfo
from tokenry.backend.ops import OpTable
from tokenry.errors import DeviceOOM
from tokenry_acme.ops import Linear


@contextmanager
def typed_oom(what: str) -> Iterator[None]:
    """Raises DeviceOOM where the device had no memory for `what`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceOOM(
            f"No memory on acme:0 for {what}: {error}",
            mend="--max-num-batched-tokens, --max-num-seqs or --memory-fraction lower",
        ) from error


class AcmeBackend(Backend):
    """Runs the core's model with torch; decode steps are recorded and replayed."""

    caps = Caps(
        input_device="acme:0",
        dtypes=("bfloat16", "float32"),
        block_sizes=(16, 32),
        graphs="capture",
    )

    def __init__(self) -> None:
        self._acme = torch.get_device_module("acme")  # the vendor's package came with torch
        self._programs = 0

    def memory(self) -> MemoryInfo:
        """The driver's counters."""
        free, total = self._acme.mem_get_info()
        return MemoryInfo(total=total, free=free, used=total - free)

    def plan_kv(self, spec: KVSpec, budget: int, probe: Callable[[], None] | None) -> KVPlan:
        """The default plan, in what the probe's true peak leaves of the budget."""
        before = self.memory().used
        self._acme.reset_peak_memory_stats()
        if probe is not None:
            probe()
            self.synchronize()
        activations = max(0, self._acme.max_memory_allocated() - before)
        plan = super().plan_kv(spec, budget - activations, None)
        return dataclasses.replace(plan, ledger={**plan.ledger, "activations": activations})

    def ops(self) -> Mapping[str, Op]:
        """One kernel of our own; the other six are the reference ops."""
        return {"linear": Linear()}

    def build_model(self, spec: ModelSpec, weights: WeightIter, ops: OpTable) -> StepFn:
        """The core's model; where its memory ends, it says so in the core's words."""
        with typed_oom("the weights"):
            step = super().build_model(spec, weights, ops)

        def run(batch: StepBatch, kv: KV) -> Tensor:
            with typed_oom(f"a step of {batch.bucket}"):
                return step(batch, kv)

        return run

    def compile(self, step: Program, example: StepBatch) -> Program:
        """Record `step` once, on buffers that stay; a run fills them and replays."""
        names = [f.name for f in dataclasses.fields(example) if f.name not in ("bucket", "extra")]
        with typed_oom(f"the program of {example.bucket}"):
            fixed = dataclasses.replace(example, **{n: getattr(example, n).clone() for n in names})
            step(fixed)  # not recorded: kernels are loaded when they first run
            graph = self._acme.Graph()
            with graph.capture():
                out = step(fixed)
        self._programs += 1

        def replay(batch: StepBatch) -> Tensor:
            for name in names:
                getattr(fixed, name).copy_(getattr(batch, name))
            graph.replay()
            return out

        return replay

    def compile_count(self) -> int:
        """Programs recorded."""
        return self._programs
