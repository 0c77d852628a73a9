"""The CPU as a device: memory is what the control group leaves, kernels are in `ops.py`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from tokenry.backend.base import Backend, Op
from tokenry.backend.contract import Caps, MemoryInfo
from tokenry.errors import ConfigError
from tokenry_cpu.memory import cpu_quota, read_memory
from tokenry_cpu.ops import cpu_ops


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
        block_sizes=(32, 16, 64, 128),
        batch_invariant=True,
    )

    def __init__(self, options: CpuOptions, root: Path = Path("/")) -> None:
        self._root = root
        torch.set_num_threads(options.threads or usable_threads(root))

    def memory(self) -> MemoryInfo:
        """Bytes of the tightest control group, or of the machine."""
        return read_memory(self._root)

    def ops(self) -> Mapping[str, Op]:
        """Kernels whose rows do not depend on the batch."""
        return cpu_ops()


def usable_threads(root: Path) -> int:
    """How many threads this process may run at once: its affinity, cut by the control group's
    quota.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota(root)
    return max(1, min(affinity or 1, math.ceil(quota) if quota else 10**6))
