"""Hooks of the Neuron backend: which device nodes are here, what is missing to use them, and the
door to the backend. No torch until it is opened.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tokenry.backend.contract import DeviceRef, hookimpl

if TYPE_CHECKING:
    from tokenry_neuron.backend import NeuronBackend

__version__ = "0.1.0"
ROOT = Path("/")
"""Where device nodes and sysfs are looked for."""
PACKAGE = "torch_neuronx"
INSTALL = (
    "pip install torch-neuronx --extra-index-url https://pip.repos.neuron.amazonaws.com "
    "(the package of that name on PyPI is a stub)"
)


@hookimpl
def tokenry_probe() -> DeviceRef | None:
    """The first Neuron device, or None without one."""
    return probe(ROOT)


@hookimpl
def tokenry_open(
    device: DeviceRef, options: Mapping[str, str], contract: tuple[int, int]
) -> NeuronBackend | None:
    """The backend, if `device` is ours. A device of score 0 is not here: programs are compiled
    for it, none runs.
    """
    if device.backend != "neuron":
        return None
    from tokenry_neuron.backend import NeuronBackend
    from tokenry_neuron.options import NeuronOptions

    return NeuronBackend(device, NeuronOptions.parse(options))


def probe(root: Path, package: str = PACKAGE) -> DeviceRef | None:
    """What the device nodes under `root` say, and whether the vendor's package is installed.

    The names are those of the driver's sysfs tree (user guide of the Neuron driver).
    """
    nodes = sorted(root.glob("dev/neuron[0-9]*"))
    if not nodes:
        return None
    facts = root / "sys/devices/virtual/neuron_device" / nodes[0].name / "info/architecture"
    name, arch = _read(facts / "device_name") or "Neuron device", _read(facts / "arch_type")
    name = f"{name} x{len(nodes)}" if len(nodes) > 1 else name
    if arch in ("NCv1", "NCv2"):
        why = f"{name} ({arch}) is older than Trainium 2, which the native TorchNeuron needs"
    elif importlib.util.find_spec(package) is None:
        why = f"torch-neuronx is not installed: {INSTALL}"
    else:
        return DeviceRef(backend="neuron", index=0, name=name, score=100, why=arch or "")
    return DeviceRef(backend="neuron", index=0, name=name, score=0, why=why)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
