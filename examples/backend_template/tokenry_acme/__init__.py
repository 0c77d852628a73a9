"""Hooks of the Acme backend: is a device here, and the door to it. No torch until it is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tokenry.backend.contract import DeviceRef, hookimpl

if TYPE_CHECKING:
    from tokenry_acme.backend import AcmeBackend


@hookimpl
def tokenry_probe() -> DeviceRef | None:
    """What the driver shows: a node per device, in /dev or where a container has it ($ACME_DEV)."""
    nodes = sorted(Path(os.environ.get("ACME_DEV", "/dev")).glob("acme[0-9]*"))
    return DeviceRef(backend="acme", index=0, name="Acme A1", score=50) if nodes else None


@hookimpl
def tokenry_open(device: DeviceRef) -> AcmeBackend | None:
    """The backend, if `device` is ours."""
    if device.backend != "acme":
        return None
    from tokenry_acme.backend import AcmeBackend

    return AcmeBackend()
