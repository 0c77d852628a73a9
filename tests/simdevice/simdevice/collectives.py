"""A torch.distributed backend under a vendor's name, which runs on gloo.

In: a name and the device's type. Out: `init_process_group(backend=name)` works for tensors of both
device and host. The library hands collectives on device memory to the group's CPU backend.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import distributed


def register_backend(name: str, device_type: str) -> None:
    """Registers `name` for `device_type` and the CPU; once."""
    if name in distributed.Backend.backend_list:
        return
    distributed.Backend.register_backend(name, _gloo, devices=[device_type, "cpu"])


def _gloo(store: Any, rank: int, size: int, timeout: timedelta) -> distributed.ProcessGroupGloo:
    return distributed.ProcessGroupGloo(store, rank, size, timeout)
