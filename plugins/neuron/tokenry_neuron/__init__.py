"""Hooks of the Neuron backend: which device nodes are here, what is missing to use them, and the
door to the backend. No torch until it is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from tokenry.backend.contract import DeviceRef, hookimpl

if TYPE_CHECKING:
    from tokenry_neuron.backend import NeuronBackend

__version__ = "0.1.0"
ROOT = Path("/")
"""Where device nodes and sysfs are looked for."""
OLD = ("0.", "1.", *(f"2.{minor}." for minor in range(10)))
"""Versions of torch-neuronx before the native backend."""
INSTALL = (
    "pip install torch-neuronx --extra-index-url https://pip.repos.neuron.amazonaws.com "
    "(the package of that name on PyPI is a stub)"
)


@hookimpl
def tokenry_probe() -> DeviceRef | None:
    """The first Neuron device, or None without one."""
    return probe(ROOT, installed())


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


def installed() -> str | None:
    """The version of the vendor's package."""
    try:
        return version("torch-neuronx")
    except PackageNotFoundError:
        return None


def probe(root: Path, package: str | None) -> DeviceRef | None:
    """What the device nodes under `root` say, and whether the vendor's package (its version) can
    use them. Names are those of the driver's sysfs tree (user guide of the Neuron driver).
    """
    nodes = sorted(root.glob("dev/neuron[0-9]*"))
    if not nodes:
        return None
    facts = root / "sys/devices/virtual/neuron_device" / nodes[0].name / "info/architecture"
    name, arch = _read(facts / "device_name") or "Neuron device", _read(facts / "arch_type") or ""
    name = f"{name} x{len(nodes)}" if len(nodes) > 1 else name
    score, why = 0, arch
    if arch in ("NCv1", "NCv2"):
        why = f"{name} ({arch}) is older than Trainium 2, which the native TorchNeuron needs"
    elif package is None:
        why = f"torch-neuronx is not installed: {INSTALL}"
    elif package.startswith(OLD):
        why = f"torch-neuronx {package} is a stub or of the XLA line: {INSTALL}"
    else:
        score = 100
    return DeviceRef(backend="neuron", index=0, name=name, score=score, why=why)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
