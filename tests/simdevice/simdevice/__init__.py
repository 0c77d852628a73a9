"""A simulated torch device for tests: see the README beside this package."""

from __future__ import annotations

import importlib
import os
import sys

from simdevice.device import Counts, Device, Memory, attach, current
from simdevice.errors import (
    DynamicShape,
    HostSync,
    NewProgram,
    NoDevice,
    NotCapturable,
    Refused,
    VendorRefuses,
)
from simdevice.processes import Run, environment, folders, report, run_on_device

_PACKAGES = {"hpu": "habana_frameworks", "neuron": "torch_neuronx", "cuda": "simdevice_cuda"}


def install(name: str, *, memory: int = 2 << 30) -> Device:
    """Puts the device into this process and its future children. Once; a second name is refused."""
    os.environ.update(environment(name, memory=memory))
    sys.path[:0] = [folder for folder in folders(name) if folder not in sys.path]
    importlib.import_module("torch")  # loads the stand-in by its entry point
    importlib.import_module(_PACKAGES.get(name, "simdevice.anyname")).load()
    return current()


__all__ = [
    "Counts",
    "Device",
    "DynamicShape",
    "HostSync",
    "Memory",
    "NewProgram",
    "NoDevice",
    "NotCapturable",
    "Refused",
    "Run",
    "VendorRefuses",
    "attach",
    "current",
    "environment",
    "install",
    "report",
    "run_on_device",
]
