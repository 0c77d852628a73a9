"""Is an AMD GPU here, which, and can it be used? From the kernel driver's own topology (amdkfd); no
torch, no HIP, nothing is opened.

In: a root directory (`/`, or a tree that a test made), the environment. Out: `DeviceRef` or None.
Files and properties: Linux, drivers/gpu/drm/amd/amdkfd/kfd_topology.c.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tokenry.backend.contract import DeviceRef

NODES = "sys/class/kfd/kfd/topology/nodes"
HIDING = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
"""The runtime's, HIP's, and HIP's other name for its own (rocm.docs.amd.com, GPU isolation)."""
NAMES = {
    "gfx90a": "AMD Instinct MI200", "gfx942": "AMD Instinct MI300", "gfx950": "AMD Instinct MI350",
    "gfx1100": "AMD Radeon RX 7900", "gfx1201": "AMD Radeon RX 9070",
}  # fmt: skip
"""The architectures that torch's ROCm builds and Triton both have (Triton: 64 or 32 lanes)."""


def find_device(root: Path, environ: Mapping[str, str]) -> DeviceRef | None:
    """None without the driver's node; score 0, with the reason and its mend, for what cannot be
    used.
    """
    node = root / "dev/kfd"
    if not node.exists():
        return _without_node(root)
    gpus = architectures(root)
    name = NAMES.get(gpus[0], f"AMD {gpus[0]}") if gpus else "AMD GPU"

    def unusable(why: str) -> DeviceRef:
        return DeviceRef(backend="rocm", index=0, name=name, score=0, why=why)

    if not gpus:
        return unusable(
            "/dev/kfd is here, but no GPU in its topology; docker run --device=/dev/kfd "
            "--device=/dev/dri, or see dmesg for amdgpu"
        )
    if not os.access(node, os.R_OK | os.W_OK):
        return unusable(
            "no right to use /dev/kfd; sudo usermod -aG render,video $USER, or docker run "
            "--group-add=render"
        )
    seen = gpus
    for variable in HIDING:
        chosen = environ.get(variable)
        if chosen is not None:
            seen = visible(seen, chosen)
            if not seen:
                return unusable(f"{variable}={chosen} hides all GPUs; unset {variable}")
    if seen[0] not in NAMES:
        return unusable(
            f"{seen[0]} is not supported ({', '.join(NAMES)} are); another card with "
            "ROCR_VISIBLE_DEVICES, or --backend cpu"
        )
    why = f"{len(seen)} visible, {seen[0]}"
    return DeviceRef(backend="rocm", index=0, name=NAMES[seen[0]], score=100, why=why)


def _without_node(root: Path) -> DeviceRef | None:
    """A card on the bus that cannot be computed on, or nothing. PCI vendor 0x1002, class 03xx
    (display) or 12xx (accelerators, which Instincts are).
    """
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor = (device / "vendor").read_text("ascii").strip()
            kind = (device / "class").read_text("ascii").strip()
        except OSError:
            continue
        if vendor == "0x1002" and kind.startswith(("0x03", "0x12")):
            loaded = (root / "sys/module/amdgpu").exists()
            mend = (
                "docker run --device=/dev/kfd --device=/dev/dri, or a kernel with CONFIG_HSA_AMD"
                if loaded
                else "sudo modprobe amdgpu, or install AMD's driver"
            )
            why = f"the card at {device.name} has no /dev/kfd; {mend}"
            return DeviceRef(backend="rocm", index=0, name="AMD GPU", score=0, why=why)
    return None


def architectures(root: Path) -> list[str]:
    """The gfx name of every GPU, in the driver's order; CPUs are nodes without SIMDs."""
    found = []
    nodes = sorted((root / NODES).glob("[0-9]*"), key=lambda path: int(path.name))
    for path in nodes:
        try:
            lines = (path / "properties").read_text("ascii").splitlines()
        except OSError:  # the container may not see this one
            continue
        facts = dict(line.split(maxsplit=1) for line in lines if " " in line)
        if int(facts.get("simd_count", "0")) > 0:
            found.append(gfx(int(facts.get("gfx_target_version", "0"))))
    return found


def gfx(version: int) -> str:
    """90402 is gfx942, 90010 gfx90a, 110000 gfx1100: two decimal digits each for minor and step,
    which the name has in hexadecimal.
    """
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def visible(gpus: list[str], chosen: str) -> list[str]:
    """The GPUs that the variable names, by number; the list ends at the first that is none. A UUID
    (GPU-...) is taken as one of them.
    """
    found: list[str] = []
    for part in (p.strip() for p in chosen.split(",")):
        if part.startswith("GPU-"):
            found.append(gpus[0])
        elif part.isdecimal() and int(part) < len(gpus):
            found.append(gpus[int(part)])
        else:
            break
    return found
