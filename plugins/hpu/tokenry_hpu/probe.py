"""Is a Gaudi here, and which? From device nodes, sysfs and hl-smi; no torch, nothing is opened.

In: a root directory (`/`, or a tree that a test made), the environment. Out: `DeviceRef` or None.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from tokenry.backend.contract import DeviceRef

VISIBLE = "HABANA_VISIBLE_MODULES"
"""docs.habana.ai, Multiple Workloads on a Single Docker: comma-separated modules of a process."""
SYSFS = "sys/class/accel/{}/device"
HABANA = "0x1da3"
"""PCI vendor: Habana Labs."""
FAMILY = {"0x100": "Gaudi", "0x101": "Gaudi", "0x102": "Gaudi 2", "0x106": "Gaudi 3"}
"""First digits of the PCI device id: habanalabs driver, habanalabs_drv.c, PCI_IDS_GAUDI*."""


def find_device(root: Path, environ: Mapping[str, str]) -> DeviceRef | None:
    """None without a device node; score 0, with the reason, for what cannot be used."""
    nodes = [*root.glob("dev/accel/accel[0-9]*"), *root.glob("dev/accel[0-9]*")]
    vendors = {path.name: _read(root / SYSFS.format(path.name) / "vendor") for path in nodes}
    ours = sorted(name for name, vendor in vendors.items() if vendor in (HABANA, None))
    if not ours:
        return None
    name = _generation(root, ours[0])

    def unusable(why: str) -> DeviceRef:
        return DeviceRef(backend="hpu", index=0, name=name, score=0, why=why)

    visible = environ.get(VISIBLE, "all").strip()
    if not visible:
        return unusable(f"{VISIBLE} is empty: no module is visible")
    if name == "Gaudi":
        return unusable("the first Gaudi is not supported by Intel's current software")
    if find_spec("habana_frameworks") is None:
        return unusable(
            "habana_frameworks is not installed; it is not on PyPI: use Intel's container "
            "(vault.habana.ai/gaudi-docker) or its installer, docs.habana.ai"
        )
    count = len(ours) if visible == "all" else len(visible.split(","))
    return DeviceRef(backend="hpu", index=0, name=name, score=100, why=f"{count} visible")


def _generation(root: Path, node: str) -> str:
    """By PCI id, else by what hl-smi says; "Gaudi (unknown)" if neither tells."""
    pci = _read(root / SYSFS.format(node) / "device") or ""
    if pci[:5] in FAMILY:
        return FAMILY[pci[:5]]
    model = _ask(root)
    return next((f"Gaudi {n}" for n in "23" if f"HL-{n}" in model), "Gaudi (unknown)")


def _ask(root: Path) -> str:
    """What hl-smi calls the first device (HL-225 is a Gaudi 2, HL-325 a Gaudi 3), "" without it."""
    command = [str(root / "usr/bin/hl-smi"), "-Q", "name", "-f", "csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=0.15, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
