"""Hooks of the HPU backend: what `tokenry devices` prints, and the door to the backend. No torch
until it is opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tokenry.backend.contract import DeviceRef, hookimpl
from tokenry_hpu.probe import find_device

if TYPE_CHECKING:
    from tokenry_hpu.backend import HpuBackend

__version__ = "0.1.0"
ROOT = Path("/")


@hookimpl
def tokenry_probe() -> DeviceRef | None:
    """What the driver shows below /dev and /sys."""
    return find_device(ROOT, os.environ)


@hookimpl
def tokenry_open(
    device: DeviceRef, options: Mapping[str, str], contract: tuple[int, int]
) -> HpuBackend | None:
    """The backend, if `device` is ours."""
    if device.backend != "hpu":
        return None
    from tokenry_hpu.backend import HpuBackend, HpuOptions

    return HpuBackend(device, HpuOptions.parse(options))
