"""The CPU as a device: memory is what the control group leaves, kernels are in `ops.py`."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tokenry.backend.base import KV, Backend, Op
from tokenry.backend.contract import Caps, HostBatch, KVPlan, KVSpec, MemoryInfo
from tokenry.errors import ConfigError, DeviceOOM
from tokenry_cpu.memory import cpu_quota, read_memory, read_peak, reset_peak
from tokenry_cpu.ops import cpu_ops, plan_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuOptions:
    """`--backend-option` of this backend.

    threads   threads of one op; 0: as many as this process may run on (affinity and control group).
    """

    threads: int = 0

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> CpuOptions:
        """Options from strings. Raises ConfigError for a name or a value that is none."""
        known = {f.name for f in fields(cls)}
        values: dict[str, int] = {}
        for key, value in options.items():
            if key not in known:
                raise ConfigError(
                    f"The cpu backend has no option {key!r}, it has {', '.join(sorted(known))}.",
                    mend="--backend-option threads=N",
                )
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(
                    f"--backend-option {key}={value}: not a whole number of at least 1.",
                    mend=f"--backend-option {key}=4",
                )
            values[key] = int(value)
        return cls(**values)


class CpuBackend(Backend):
    """Runs the core's model eagerly, in this process's memory."""

    caps = Caps(
        dtypes=("float32", "bfloat16", "float16"),
        block_sizes=(16, 32, 64, 128),
        batch_invariant=True,
    )

    def __init__(self, options: CpuOptions, root: Path = Path("/")) -> None:
        self._root = root
        torch.set_num_threads(options.threads or usable_threads(root))

    def memory(self) -> MemoryInfo:
        """Bytes of the tightest control group, or of the machine."""
        return read_memory(self._root)

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """Per layer [num_blocks, 2, KH, block_size, D], zeroed: a head's share of a block is one
        copy.

        The pages come from the kernel as zeros when a block is first written: clearing gigabytes
        here would be most of the start-up. Raises DeviceOOM: the kernel would grant the memory now
        and kill the process when it is touched.
        """
        need, free = num_blocks * spec.block_bytes, self.memory().free
        if need > free:
            raise DeviceOOM(
                f"{num_blocks} KV blocks need {need / 2**30:.2f} GiB, "
                f"{free / 2**30:.2f} GiB is free.",
                mend="--memory-fraction or --max-model-len lower",
            )
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        dtype = getattr(torch, spec.dtype)
        return [lazy_zeros(shape, dtype) for _ in range(spec.num_layers)]

    def plan_kv(self, spec: KVSpec, budget: int, probe: Callable[[], None] | None) -> KVPlan:
        """As the base class, with activations from the resident set's peak: what a step needs is
        given back to the kernel by the time it is over. `weights` is all that the process holds.
        """
        before = self.memory().used
        reset = probe is not None and reset_peak(self._root)
        plan = super().plan_kv(spec, budget, probe)
        if not reset:
            return plan
        activations = max(plan.ledger["activations"], read_peak(self._root) - before)
        room = plan.ledger["kv"] - (activations - plan.ledger["activations"])
        num_blocks = max(0, room // spec.block_bytes)
        kv = num_blocks * spec.block_bytes
        return KVPlan(
            num_blocks=num_blocks, ledger={**plan.ledger, "activations": activations, "kv": kv}
        )

    def attn_inputs(self, host: HostBatch) -> Mapping[str, NDArray[np.int32]]:
        """Which rows attention takes together."""
        return plan_rows(host)

    def ops(self) -> Mapping[str, Op]:
        """Kernels whose rows do not depend on the batch."""
        return cpu_ops()


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A zeroed tensor whose pages, huge where the kernel has them, cost nothing until touched."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)


def usable_threads(root: Path) -> int:
    """How many threads this process may run at once: its affinity, cut by the control group's
    quota.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota(root)
    return max(1, min(affinity or 1, math.ceil(quota) if quota else 10**6))
