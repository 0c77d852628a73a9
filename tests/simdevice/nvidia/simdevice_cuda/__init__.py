"""`torch.cuda` on the simulated device, for tests only: presence, memory, streams, events and
graphs.

torch's own CUDA module can't run without a driver, so its functions are replaced here, in the
test's process. No cuBLAS, no NCCL, no driver and no compiler is behind it. $SIMDEVICE_GPU names the
card: H200 (default) or MI300X, which also sets torch.version.hip.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import simdevice
import torch
from simdevice.device import Device
from simdevice.module import functions

from simdevice_cuda.graphs import CUDAGraph, graph, graph_pool_handle, is_capturing

CARDS = {
    "H200": SimpleNamespace(
        name="NVIDIA H200 (simulated)", major=9, minor=0, warp_size=32, gcnArchName="",
        multi_processor_count=132, shared_memory_per_block_optin=232448,
    ),
    "MI300X": SimpleNamespace(
        name="AMD Instinct MI300X (simulated)", major=9, minor=4, warp_size=64,
        gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304,
        shared_memory_per_block_optin=65536,
    ),
}  # fmt: skip


def load() -> None:
    """The `torch.backends` entry point."""
    device = simdevice.attach("cuda")
    card = CARDS[os.environ.get("SIMDEVICE_GPU", "H200")]
    served = functions(device, title=card.name) | _of_cuda(device, card)
    vars(torch.cuda).update(served)
    if card.gcnArchName:
        torch.version.hip = "6.4"
    else:
        torch.version.cuda = "12.8"


def _of_cuda(device: Device, card: SimpleNamespace) -> dict[str, object]:
    def properties(ordinal: object = None) -> SimpleNamespace:
        return SimpleNamespace(**vars(card), total_memory=device.memory().limit_bytes)

    def memory_stats(ordinal: object = None) -> dict[str, int]:
        memory = device.memory()
        return {
            "allocated_bytes.all.current": memory.allocated_bytes,
            "allocated_bytes.all.peak": memory.peak_bytes,
            "reserved_bytes.all.current": memory.allocated_bytes,
            "reserved_bytes.all.peak": memory.peak_bytes,
            "num_ooms": 0,
        }

    return {
        "_initialized": True,
        "get_device_properties": properties,
        "get_device_capability": lambda ordinal=None: (card.major, card.minor),
        "memory_stats": memory_stats,
        "is_bf16_supported": lambda including_emulation=True: True,
        "reset_accumulated_memory_stats": lambda ordinal=None: None,
        "set_sync_debug_mode": _SyncDebug(device).set,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": graph_pool_handle,
        "is_current_stream_capturing": is_capturing,
    }


class _SyncDebug:
    """torch.cuda.set_sync_debug_mode: "error" forbids host syncs in this thread until "default"."""

    def __init__(self, device: Device) -> None:
        self._device, self._forbids = device, False

    def set(self, mode: int | str) -> None:
        forbids = mode in ("error", 2)
        if forbids != self._forbids:
            self._device.library.call("forbid_sync", 1 if forbids else -1)
        self._forbids = forbids
