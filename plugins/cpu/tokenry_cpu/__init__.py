"""Hooks of the CPU backend: what `tokenry devices` prints, and the door to the backend. No torch
until it is opened.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tokenry.backend.contract import DeviceRef, hookimpl
from tokenry.errors import ConfigError

if TYPE_CHECKING:
    from tokenry_cpu.backend import CpuBackend

__version__ = "0.1.0"
NOTABLE_ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "bf16", "sve")


@hookimpl
def tokenry_probe() -> DeviceRef:
    """Always here, with the lowest score, so that any accelerator goes before it."""
    name, isa = read_cpuinfo(Path("/proc/cpuinfo"))
    return DeviceRef(backend="cpu", index=0, name=name, score=1, why=" ".join(isa))


@hookimpl
def tokenry_open(
    device: DeviceRef, options: Mapping[str, str], contract: tuple[int, int]
) -> CpuBackend | None:
    """The backend, if `device` is ours."""
    if device.backend != "cpu":
        return None
    if device.index != 0:
        raise ConfigError(
            f"The cpu backend has one device, there is none of index {device.index}.",
            mend="--device-index 0; --backend-option threads=N takes fewer cores",
        )
    from tokenry_cpu.backend import CpuBackend, CpuOptions

    return CpuBackend(CpuOptions.parse(options, os.environ))


def read_cpuinfo(path: Path) -> tuple[str, tuple[str, ...]]:
    """The processor's name, and which of the instruction sets that matter it has."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    facts = {
        key.strip().lower(): value.strip() for key, _, value in (x.partition(":") for x in lines)
    }
    name = facts.get("model name") or platform.processor() or platform.machine() or "CPU"
    flags = set((facts.get("flags") or facts.get("features") or "").split())
    return name, tuple(flag for flag in NOTABLE_ISA if flag in flags)
