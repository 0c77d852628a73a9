"""Where the device's bytes go: the driver's count, the allocator's, and the plan of the KV.

In: a device index, a budget, a probe that runs the largest step. Out: `MemoryInfo`, `KVPlan`,
errors in the core's words. Knows no tensors and no models.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tokenry.backend.contract import KVPlan, KVSpec, MemoryInfo
from tokenry.errors import DeviceLost, DeviceOOM

GIB = 2**30
OUT_OF_MEMORY = 2
STICKY = frozenset({214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721})
"""Codes after which "the process must be terminated and relaunched", as the CUDA runtime's
reference says of them (cudaErrorIllegalAddress is 700, cudaErrorLaunchFailure 719, ECC 214); HIP
numbers them alike (hip_runtime_api.h).
"""
MEND = "--max-num-batched-tokens, --max-num-seqs or --memory-fraction lower"


def read_memory(index: int) -> MemoryInfo:
    """Bytes of the device. What torch's allocator holds and nobody uses counts as free."""
    free, total = torch.cuda.mem_get_info(index)
    cached = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    free = min(total, free + max(0, cached))
    return MemoryInfo(total=total, free=free, used=total - free)


@contextmanager
def typed_errors(what: str, index: int, mend: str = MEND) -> Iterator[None]:
    """Raises DeviceOOM where the device had no memory for `what` (it stays usable, and what torch
    keeps of its memory unused is given back), DeviceLost where its context is beyond use: every
    later call would fail in the same way.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of what did not fit
        torch.cuda.empty_cache()
        free = read_memory(index).free
        raise DeviceOOM(
            f"No memory for {what} on cuda:{index}, {free / GIB:.2f} GiB is free: "
            f"{first_line(error)}",
            mend=mend,
        ) from error
    except torch.AcceleratorError as error:
        code = getattr(error, "error_code", None)
        if code == OUT_OF_MEMORY:  # of the driver itself: recordings, kernels
            raise DeviceOOM(
                f"The driver has no memory for {what} on cuda:{index}: {first_line(error)}",
                mend=mend,
            ) from error
        if code is not None and code not in STICKY:
            raise
        raise DeviceLost(
            f"The device cuda:{index} failed in {what} and cannot be used by this process any "
            f"more: {first_line(error)}",
            mend="restart; `dmesg` has the driver's words, and with CUDA_LAUNCH_BLOCKING=1 the "
            "traceback ends at the kernel at fault",
        ) from error


def first_line(error: BaseException) -> str:
    """Of its text, which goes on with advice for developers of kernels."""
    return str(error).partition("\n")[0]


def plan_kv(
    index: int,
    spec: KVSpec,
    budget: int,
    probe: Callable[[], None] | None,
    *,
    programs: int | None,
) -> KVPlan:
    """Blocks in what weights, activations and programs leave of `budget` bytes.

    activations  the peak of what the allocator held while the probe ran the largest step, and what
                 the driver took meanwhile for kernels and libraries.
    programs     bytes kept for captured programs; None: as many as the activations, for a captured
                 step is never larger than the largest one, and all share one pool.
    margin       2 % of the budget.
    Raises DeviceOOM where the probe's step does not fit.
    """
    torch.cuda.empty_cache()
    before = read_memory(index)
    activations = 0
    if probe is not None:
        held, own = torch.cuda.memory_reserved(index), _beside_allocator(index)
        torch.cuda.reset_peak_memory_stats(index)
        with typed_errors("the largest step beside the weights", index):
            probe()
            torch.cuda.synchronize(index)
        peak = torch.cuda.max_memory_reserved(index) - held
        activations = max(0, peak) + max(0, _beside_allocator(index) - own)
        torch.cuda.empty_cache()
    kept = activations if programs is None else programs
    margin = budget // 50
    room = max(0, min(budget - before.used, before.free) - activations - margin - kept)
    num_blocks = room // spec.block_bytes
    return KVPlan(
        num_blocks=num_blocks,
        ledger={
            "weights": before.used,
            "activations": activations,
            "programs": kept,
            "margin": margin,
            "kv": num_blocks * spec.block_bytes,
        },
    )


def _beside_allocator(index: int) -> int:
    """Bytes in use that torch's allocator does not know of: context, kernels, other processes."""
    free, total = torch.cuda.mem_get_info(index)
    return total - free - torch.cuda.memory_reserved(index)
