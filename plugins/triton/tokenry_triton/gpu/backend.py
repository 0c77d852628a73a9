"""A GPU of torch's "cuda" type as a `Backend`: memory, copies, programs, kernels.

The vendors differ in what their plugins hand in: the architecture's name, which dtypes and which
FP8 it has. Steps run on the current stream; the host waits only in the function that `fetch` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import KV, Backend, ModelSpec, Op, Program, StepBatch, StepFn, WeightIter
from tokenry.backend.contract import Caps, KVPlan, KVSpec, MemoryInfo, ShapeRules
from tokenry.backend.ops import OpTable
from tokenry.backend.reference import ReferenceOp
from tokenry.errors import ConfigError
from tokenry_triton.gpu.choice import Gpu, block_sizes, pick_ops, tuner_of
from tokenry_triton.gpu.graphs import Captures
from tokenry_triton.gpu.memory import plan_kv, read_memory, typed_errors
from tokenry_triton.gpu.options import GpuOptions

MIB = 2**20
QUANT = frozenset({"int8", "int4"})
"""What Triton's products have of the formats that `--quantization` knows."""


class GpuBackend(Backend):
    """Runs the core's model; decode steps are captured and replayed."""

    def __init__(self, gpu: Gpu, options: GpuOptions) -> None:
        if options.linear == "fp8" and gpu.fp8 == "none":
            raise ConfigError(
                f"--backend-option linear=fp8: {gpu.arch} has no FP8 products.",
                mend="leave it out",
            )
        self._index = gpu.index
        self._options = options
        self._captures = Captures(gpu.index)
        self._side: Any = torch.cuda.Stream(gpu.index)  # type: ignore[no-untyped-call]  # torch's
        self._tuner = tuner_of(gpu, options)
        self._ops = pick_ops(gpu, options, self._tuner)
        quantizes = hasattr(self._ops["linear"], "quantize") and hasattr(
            self._ops["moe"], "quantize"
        )
        self.caps = Caps(
            input_device=f"cuda:{gpu.index}",
            dtypes=gpu.dtypes,
            fp8=gpu.fp8,
            block_sizes=block_sizes(self._ops),
            shapes=ShapeRules(mixed_tokens=options.graph_tokens),
            quant=QUANT if quantizes else frozenset(),
            batch_invariant=options.deterministic == "true",
            invariant_option="deterministic=true",
            pinned_inputs=True,
            graphs="none" if options.graphs == "none" else "capture",
            # nccl is torch's name for RCCL, too; builds without it (Windows) have gloo
            dist="nccl" if torch.distributed.is_nccl_available() else "gloo",
        )

    def memory(self) -> MemoryInfo:
        """The driver's count, less what torch's allocator has spare."""
        return read_memory(self._index)

    def synchronize(self) -> None:
        """All streams of the device."""
        with typed_errors("a step before this", self._index):
            torch.cuda.synchronize(self._index)

    def fetch(self, tensors: Sequence[Tensor]) -> Callable[[], list[NDArray[Any]]]:
        """One copy for all of them, into pinned memory, on a stream of its own: behind what was
        launched so far, beside what is launched later, which does not wait for it.
        """
        kinds = [(tuple(t.shape), t.dtype, t.nbytes) for t in tensors]
        parts = [t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors if t.numel()]
        with typed_errors("the results of a step", self._index):
            flat = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
            # pinned memory comes from torch's cache, which gives it away again only after the copy
            host = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True)
            self._side.wait_stream(torch.cuda.current_stream(self._index))
            with torch.cuda.stream(self._side):
                host.copy_(flat, non_blocking=True)
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
                done.record(self._side)
        source = [flat]  # until it is copied, nobody else gets its memory

        def wait() -> list[NDArray[Any]]:
            with typed_errors("a step", self._index):
                done.synchronize()
            source.clear()
            return _arrays(host.numpy(), kinds)

        return wait

    def plan_kv(self, spec: KVSpec, budget: int, probe: Callable[[], None] | None) -> KVPlan:
        """With the probe's real peak, and memory kept for programs.

        A tuner measures the tiles of the largest step before.
        """
        kept: int | None = self._options.graph_memory * MIB or None
        if self.caps.graphs == "none":
            kept = 0
        if self._tuner is not None and probe is not None:
            with self._tuner.warm_up(), typed_errors("the largest step, to tune it", self._index):
                probe()
        return plan_kv(self._index, spec, budget, probe, programs=kept)

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """As the base class, of memory that nothing cached stands in the way of."""
        torch.cuda.empty_cache()
        return super().alloc_kv(spec, num_blocks)

    def ops(self) -> Mapping[str, Op]:
        """Triton's kernels or torch's."""
        return {**self._ops, "sample": Guarded(self._ops["sample"], self._index)}

    def build_model(self, spec: ModelSpec, weights: WeightIter, ops: OpTable) -> StepFn:
        """The core's model, on this device whatever the thread, with errors in the core's words."""
        with typed_errors("the weights", self._index, "a smaller model or --dtype"):
            step = super().build_model(spec, weights, ops)

        def run(batch: StepBatch, kv: KV) -> Tensor:
            with (
                torch.accelerator.device_index(self._index),
                typed_errors(f"a step of {batch.bucket}", self._index),
            ):
                return step(batch, kv)

        return run

    def compile(self, step: Program, example: StepBatch) -> Program:
        """Capture it."""
        if self.caps.graphs == "none":
            return step
        with torch.accelerator.device_index(self._index):
            if self._tuner is not None:  # a launch cannot be measured while it is captured
                with self._tuner.warm_up():
                    step(example)
            replay = self._captures.make(step, example)

        def program(batch: StepBatch) -> Tensor:
            with (
                torch.accelerator.device_index(self._index),
                typed_errors(f"a step of {batch.bucket}", self._index),
            ):
                return replay(batch)

        return program

    def compile_count(self) -> int:
        """Programs captured."""
        return self._captures.made

    def program_bytes(self) -> int | None:
        """What the driver has less since they were captured."""
        return None if self.caps.graphs == "none" else self._captures.bytes


class Guarded(ReferenceOp):
    """An op that the core calls outside the model's step, on its device whatever the thread."""

    def __init__(self, op: Op, index: int) -> None:
        self._op, self._index = op, index

    def supports(self, **meta: Any) -> bool:
        """As the op says."""
        return self._op.supports(**meta)

    def __call__(self, *args: Any) -> Any:
        """Run it. Raises DeviceOOM, DeviceLost."""
        with (
            torch.accelerator.device_index(self._index),
            typed_errors("drawing tokens", self._index),
        ):
            return self._op(*args)


def _arrays(
    host: NDArray[np.uint8], kinds: Sequence[tuple[tuple[int, ...], torch.dtype, int]]
) -> list[NDArray[Any]]:
    """Copies of the packed tensors."""
    found: list[NDArray[Any]] = []
    at = 0
    for shape, dtype, size in kinds:
        raw = host[at : at + size].copy()  # of its own, and aligned
        empty = torch.empty(0, dtype=dtype).numpy()
        found.append(raw.view(empty.dtype).reshape(shape))
        at += size
    return found
