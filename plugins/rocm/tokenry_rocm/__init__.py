"""Hooks of the ROCm backend: what `tokenry devices` prints, and the door to the backend. No torch
until it is opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tokenry.backend.contract import DeviceRef, hookimpl
from tokenry_rocm.probe import find_device
from tokenry_triton.gpu.libraries import with_libraries

if TYPE_CHECKING:
    from tokenry_triton.gpu.backend import GpuBackend

__version__ = "0.1.0"
ROOT = Path("/")
LIBRARIES = {"aiter": ("aiter",)}
"""Modules of providers.py."""


@hookimpl
def tokenry_probe() -> DeviceRef | None:
    """What the kernel's driver shows below /dev and /sys."""
    return with_libraries(find_device(ROOT, os.environ), LIBRARIES)


@hookimpl
def tokenry_open(
    device: DeviceRef, options: Mapping[str, str], contract: tuple[int, int]
) -> GpuBackend | None:
    """The backend, if `device` is ours."""
    if device.backend != "rocm":
        return None
    from tokenry_rocm.backend import open_device

    return open_device(device, options)
