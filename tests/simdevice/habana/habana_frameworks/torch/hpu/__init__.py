"""`torch.hpu`: memory, streams, events and graphs of the simulated Gaudi."""

from __future__ import annotations

import os
from types import SimpleNamespace

import simdevice
import torch

from habana_frameworks.torch.hpu import metrics, random
from habana_frameworks.torch.hpu.graphs import HPUGraph, graph, wrap_in_hpu_graph

_device = simdevice.attach("hpu")


def register() -> None:
    """`torch.hpu` is this module."""
    import sys

    if getattr(torch, "hpu", None) is None:
        torch._register_device_module("hpu", sys.modules[__name__])


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def init() -> None:
    """The device is ready since the import."""


def _lazy_init() -> None:
    """Called by torch; the device is ready since the import."""


def _is_in_bad_fork() -> bool:
    return False


def manual_seed_all(seed: int) -> None:
    random.manual_seed_all(seed)


def manual_seed(seed: int) -> None:
    random.manual_seed_all(seed)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float32]


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: object) -> None:
    """There is one device. Raises RuntimeError for another ordinal."""
    torch.empty(0, device=torch.device("hpu", device) if isinstance(device, int) else device)


def get_device_name(device: object = None) -> str:
    return f"GAUDI{os.environ.get('SIMDEVICE_GAUDI', '2')}"


def get_device_properties(device: object = None) -> SimpleNamespace:
    memory = _device.memory()
    return SimpleNamespace(name=get_device_name(), total_memory=memory.limit_bytes)


def get_device_capability(device: object = None) -> str:
    return "1.23.0"


def synchronize(device: object = None) -> None:
    """Waits for all work; closes the recipe in lazy mode."""
    _device.mark_step()
    _device.synchronize()


def mem_get_info(device: object = None) -> tuple[int, int]:
    """(free, total) bytes."""
    memory = _device.memory()
    return memory.free_bytes, memory.limit_bytes


def memory_allocated(device: object = None) -> int:
    return _device.memory().allocated_bytes


def memory_reserved(device: object = None) -> int:
    return _device.memory().allocated_bytes


def max_memory_allocated(device: object = None) -> int:
    return _device.memory().peak_bytes


def reset_peak_memory_stats(device: object = None) -> None:
    _device.reset_peak()


def memory_stats(device: object = None) -> dict[str, int]:
    memory = _device.memory()
    return {
        "Limit": memory.limit_bytes,
        "InUse": memory.allocated_bytes,
        "MaxInUse": memory.peak_bytes,
        "NumAllocs": memory.num_allocations,
    }


class Stream(torch.Stream):
    """A stream of the device; there is no overlap to see."""

    def __new__(cls, device: object = None, priority: int = 0) -> Stream:
        return super().__new__(cls, device="hpu", priority=priority)


class Event(torch.Event):
    """An event; once it is reached, asynchronous copies before it have arrived."""

    def __new__(cls, enable_timing: bool = False) -> Event:
        return super().__new__(cls, device="hpu", enable_timing=enable_timing)


def current_stream(device: object = None) -> torch.Stream:
    return torch._C._accelerator_getStream(0)


def default_stream(device: object = None) -> torch.Stream:
    return torch.Stream(
        stream_id=0, device_index=0, device_type=int(torch._C._autograd.DeviceType.HPU)
    )


def stream(stream: torch.Stream) -> torch.Stream:
    """A context in which work goes to `stream`."""
    return stream


def enable_dynamic_shape() -> None:
    """Refused: the simulated device takes static shapes only."""
    raise simdevice.VendorRefuses("dynamic shapes are not simulated")


def disable_dynamic_shape() -> None:
    """Static shapes are all there is."""


__all__ = ["HPUGraph", "graph", "metrics", "random", "wrap_in_hpu_graph"]
