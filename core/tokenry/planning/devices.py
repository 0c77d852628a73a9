"""Devices by name, from data: how much memory, how fast, and what their programs look like.

In: a name such as `NAME` or `NAMEx8`. Out: `DeviceFigures` and how many, or a ConfigError that
lists what is known. The figures are in devices.toml: this file knows no vendor.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from tokenry.backend.contract import Caps, PhaseRules, ShapeRules
from tokenry.errors import ConfigError

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFigures:
    """One device. bandwidth in bytes per second, flops in operations per second at bfloat16.

    runtime_bytes          held by driver and runtime before a model is loaded (an estimate).
    graph_memory_fraction  kept for programs, of what weights, activations and margin leave.
    caps                   what matters here: block size, shapes, phases, graphs.
    """

    key: str
    name: str
    memory_bytes: int
    bandwidth: float
    flops: float
    runtime_bytes: int
    graph_memory_fraction: float
    caps: Caps


def find_device(text: str) -> tuple[DeviceFigures, int]:
    """The device and the number of them that `NAME` or `NAMExN` means."""
    data = _data()
    known = data["devices"]
    name, count = text.lower(), 1
    if name not in known:
        found = re.fullmatch(r"(.+)x(\d+)", name)
        if found is not None:
            name, count = found[1], int(found[2])
    if name not in known or count < 1:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"No figures of a device {text!r}.",
            mend=f"{hint}--device NAME or NAMExCOUNT, of {', '.join(sorted(known))}",
        )
    return _figures(name, known[name], data["families"][known[name]["family"]]), count


def _figures(key: str, device: dict[str, Any], family: dict[str, Any]) -> DeviceFigures:
    return DeviceFigures(
        key=key,
        name=device["name"],
        memory_bytes=device["memory_mib"] * MIB,
        bandwidth=device["bandwidth_gbs"] * 1e9,
        flops=device["bf16_tflops"] * 1e12,
        runtime_bytes=device["runtime_mib"] * MIB,
        graph_memory_fraction=family["graph_memory_fraction"],
        caps=Caps(
            block_sizes=(family["block_size"],),
            graphs=family["graphs"],
            shapes=ShapeRules(**family.get("shapes", {})),
            phases=PhaseRules(**family.get("phases", {})),
        ),
    )


def _data() -> dict[str, Any]:
    text = resources.files("tokenry.planning").joinpath("devices.toml").read_text("utf-8")
    return tomllib.loads(text)
