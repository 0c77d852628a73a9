"""Putting a PrivateUse1 device under a name into torch.

In: the name and the functions of its module. Out: `torch.<name>`, tensors' `.<name>()` and
`is_<name>`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType

import torch
from torch.utils import backend_registration

from simdevice.device import Device, attach


def attach_private(name: str) -> Device:
    """The device of this process under `name`; torch knows the name afterwards."""
    if torch._C._get_privateuse1_backend_name() != name:
        backend_registration.rename_privateuse1_backend(name)
    return attach(name)


def serve(name: str, functions: Mapping[str, object]) -> ModuleType:
    """`torch.<name>` with these functions; once."""
    served = getattr(torch, name, None)
    if isinstance(served, ModuleType):
        return served
    module = ModuleType(f"torch.{name}", f"The simulated device {name}.")
    vars(module).update(functions)
    torch._register_device_module(name, module)  # type: ignore[no-untyped-call]  # torch's own
    sys.modules[f"torch.{name}"] = module
    backend_registration.generate_methods_for_privateuse1_backend()
    return module
