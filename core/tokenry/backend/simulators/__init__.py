"""Simulated devices, so that the core is kept honest where no accelerator is.

In: a DeviceRef and options: `memory=BYTES`; `oom_at=N,...` and `lost_at=N`, launches that fail (see
faults.py); `deterministic=true` for sim-cuda (see rowwise.py). Out: a Backend that computes with
the reference ops in host memory but is as strict as the kind of device it is named after. Importing
this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tokenry.backend.contract import DeviceRef
from tokenry.errors import ConfigError

if TYPE_CHECKING:
    from tokenry.backend.base import Backend

SIMULATORS: Mapping[str, str] = {
    "sim-cuda": "dynamic shapes, decode captured and replayed at fixed addresses",
    "sim-hpu": "static shapes, one prefill at a time, KV bucketed by total blocks",
    "sim-neuron": "static shapes, KV baked into programs, planned without the device",
    "sim-whole": "as sim-neuron, but a prompt is one step: no chunks, no cached beginning",
    "sim-opaque": "tensors that show no value in a step",
}
"""They run everywhere and are never chosen by themselves."""

DEFAULT_MEMORY = "1073741824"


def open_simulator(device: DeviceRef, options: Mapping[str, str]) -> Backend:
    """The simulator of that name."""
    from tokenry.backend.simulators.capture import SimCapture
    from tokenry.backend.simulators.device import SimulatedDevice
    from tokenry.backend.simulators.faults import Faults
    from tokenry.backend.simulators.opaque import SimOpaque
    from tokenry.backend.simulators.static import SimBaked, SimTotal
    from tokenry.backend.simulators.whole import SimWhole

    memory = options.get("memory", DEFAULT_MEMORY)
    if not memory.isdecimal():
        raise ConfigError(f"--backend-option memory={memory}: not a number of bytes.")
    kinds: Mapping[str, type[SimTotal | SimBaked | SimOpaque]] = {
        "sim-hpu": SimTotal,
        "sim-neuron": SimBaked,
        "sim-whole": SimWhole,
        "sim-opaque": SimOpaque,
    }
    backend: SimulatedDevice
    if device.backend == "sim-cuda":
        chosen = options.get("deterministic", "false")
        if chosen not in ("false", "true"):
            raise ConfigError(f"--backend-option deterministic={chosen}: false or true.")
        backend = SimCapture(int(memory), deterministic=chosen == "true")
    else:
        backend = kinds[device.backend](int(memory))
    backend.faults = Faults.parse(options)
    return backend
