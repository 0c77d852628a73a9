"""Which libraries with attention are installed, for the line of `tokenry devices`. No torch, and
nothing of them is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec

from tokenry.backend.contract import DeviceRef


def with_libraries(
    device: DeviceRef | None, modules: Mapping[str, tuple[str, ...]]
) -> DeviceRef | None:
    """The device, its line naming what may be asked for with `--backend-option attention=`.

    modules  by the option's value: any of these will do
    """
    found = [name for name, any_of in modules.items() if any(map(find_spec, any_of))]
    if device is None or device.score == 0 or not found:
        return device
    return replace(device, why=f"{device.why}, attention can be {' or '.join(found)}")
