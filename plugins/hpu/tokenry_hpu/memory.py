"""Where the device's bytes go: the vendor's counters, and the plan of the KV beside the programs.

In: the vendor's module torch.hpu, a budget, a probe that runs a worst step. Out: `MemoryInfo`,
`KVPlan`. Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenry.backend.contract import KVPlan, KVSpec, MemoryInfo
from tokenry_hpu.vendor import typed_oom

MEND = "--max-num-batched-tokens or --max-num-seqs lower, or a smaller model"


def read_memory(hpu: Any) -> MemoryInfo:
    """Bytes of the device: what its driver left to this process, and what of that is in use."""
    free, total = hpu.mem_get_info()
    return MemoryInfo(total=total, free=free, used=total - free)


def plan_kv(
    hpu: Any, spec: KVSpec, budget: int, probe: Callable[[], None] | None, *, fraction: float
) -> KVPlan:
    """Blocks in what weights, activations and programs leave of `budget` bytes.

    activations  the peak while the probe runs the largest step, beyond what was in use before.
    programs     `fraction` of what weights, activations and margin leave: recorded programs keep
                 their own buffers, which are only known when all of them have run.
    margin       2 % of the budget.
    Raises DeviceOOM where the probe's step does not fit.
    """
    before = read_memory(hpu)
    activations = 0
    if probe is not None:
        hpu.reset_peak_memory_stats()
        with typed_oom("the largest step beside the weights", MEND):
            probe()
            hpu.synchronize()
        activations = max(0, hpu.max_memory_allocated() - before.used)
    margin = budget // 50
    room = max(0, min(budget - before.used, before.free) - activations - margin)
    programs = int(room * fraction)
    num_blocks = (room - programs) // spec.block_bytes
    return KVPlan(
        num_blocks=num_blocks,
        ledger={
            "weights": before.used,
            "activations": activations,
            "programs": programs,
            "margin": margin,
            "kv": num_blocks * spec.block_bytes,
        },
    )
