"""The functions of a `torch.<name>` module: memory, streams, events, seeds, properties.

In: a Device. Out: a dict of functions and classes that stand-ins put into their module. Knows
nothing of vendors.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from simdevice.device import Device


def functions(device: Device, *, title: str) -> dict[str, object]:
    """By name; `title` is what the device calls itself."""
    return _presence(device, title) | _memory(device) | _order(device) | _seeds(device)


def _presence(device: Device, title: str) -> dict[str, object]:
    def set_device(ordinal: int | str | torch.device) -> None:
        """There is one device. Raises RuntimeError for another ordinal."""
        where = torch.device(device.name, ordinal) if isinstance(ordinal, int) else ordinal
        torch.empty(0, device=where)

    def properties(ordinal: object = None) -> SimpleNamespace:
        return SimpleNamespace(name=title, total_memory=device.memory().limit_bytes)

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": set_device,
        "get_device_name": lambda ordinal=None: title,
        "get_device_properties": properties,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16, torch.float32],
    }


def _memory(device: Device) -> dict[str, object]:
    def mem_get_info(ordinal: object = None) -> tuple[int, int]:
        memory = device.memory()
        return memory.free_bytes, memory.limit_bytes

    return {
        "mem_get_info": mem_get_info,
        "memory_allocated": lambda ordinal=None: device.memory().allocated_bytes,
        "memory_reserved": lambda ordinal=None: device.memory().allocated_bytes,
        "max_memory_allocated": lambda ordinal=None: device.memory().peak_bytes,
        "max_memory_reserved": lambda ordinal=None: device.memory().peak_bytes,
        "reset_peak_memory_stats": lambda ordinal=None: device.reset_peak(),
        "empty_cache": lambda: None,
    }


def _order(device: Device) -> dict[str, object]:
    class Stream(torch.Stream):
        """A stream of the device; there is no overlap to see."""

        def __new__(cls, ordinal: object = None, priority: int = 0, **rest: object) -> Stream:
            return super().__new__(cls, device=device.name, priority=priority)

    class Event(torch.Event):
        """An event; once it is reached, asynchronous copies before it have arrived."""

        def __new__(cls, enable_timing: bool = False, **rest: object) -> Event:
            return super().__new__(cls, device=device.name, enable_timing=enable_timing)

    def default_stream(ordinal: object = None) -> torch.Stream:
        now = torch._C._accelerator_getStream(0)
        return torch.Stream(stream_id=0, device_index=0, device_type=now.device_type)

    return {
        "Stream": Stream,
        "Event": Event,
        "synchronize": lambda ordinal=None: device.synchronize(),
        "current_stream": lambda ordinal=None: torch._C._accelerator_getStream(0),
        "default_stream": default_stream,
        "stream": lambda stream: stream,
    }


def _seeds(device: Device) -> dict[str, object]:

    def seed(value: int) -> None:
        """Device operators without a generator draw from torch's CPU generator here."""
        torch.default_generator.manual_seed(value)

    def get_rng_state(ordinal: object = None) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(state: torch.Tensor, ordinal: object = None) -> None:
        torch.default_generator.set_state(state)

    return {
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "Generator": lambda ordinal=None: torch.Generator(device=device.name),
    }
