"""All that this plugin uses of the vendor's software, with signatures and sources, and the few
calls through which the other files reach it.

In: variables to be set. Out: the loaded package, memory in use, versions. Knows nothing of models.
Sources: "reference" = the vendor's pages on the torch.compile backend and on environment variables
(SDK 2.33); "module" = the public source of `torch.neuron`; "plugin" = the vendor's own serving
plugin and its design notes. Nothing here has met the vendor's package: see README.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from tokenry.errors import BackendError
from tokenry_neuron import INSTALL

log = logging.getLogger(__name__)
PACKAGE = "torch_neuronx"
DEVICE = COMPILER = "neuron"
SYMBOLS: Mapping[str, str] = {
    "torch.neuron.synchronize": "(device=None) -> None; module",
    "torch.neuron.memory_allocated": "(device=None) -> int; module",
    "torch.neuron.get_device_properties": "(device=None) -> .total_memory: int; module",
}
"""Functions. Beside them torch.compile(backend="neuron", fullgraph=True, dynamic=False); reference.
"""
VARIABLES: Mapping[str, str] = {
    "TORCH_NEURONX_NEFF_CACHE_DIR": "directory of compiled graphs; plugin",
    "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION": "1: a program that fails raises; reference",
    "TORCH_NEURONX_DYNAMO_DISABLE_CPU_AUTOCOPY": "1: host tensors raise; reference",
    "TORCH_NEURONX_COMPILE_ONLY": "1: compile without a device; plugin",
    "NEURON_RT_VISIBLE_CORES": "the logical core to use; runtime's configuration page",
    "NEURON_PLATFORM_TARGET_OVERRIDE": "chip to compile for without a device; plugin",
}
READ_ONLY = ("NEURON_CC_FLAGS", "NEURON_COMPILER_OPT_LEVEL", "NEURON_LOGICAL_NC_CONFIG")
"""Variables of the user that change what is compiled; reference, plugin."""


def connect(variables: Mapping[str, str]) -> dict[str, str]:
    """Load the package with these variables, the user's own values going first; gives the values
    that hold. Raises BackendError where it is missing or is not the native backend.
    """
    new = {name: value for name, value in variables.items() if name not in os.environ}
    if new:
        os.environ.update(new)
        log.warning("set for torch-neuronx: %s", " ".join(f"{k}={v}" for k, v in new.items()))
    try:
        importlib.import_module(PACKAGE)
    except ImportError as error:
        text = " ".join(str(error).split())
        raise BackendError(f"torch-neuronx cannot be imported: {text}.", mend=INSTALL) from error
    lacking = missing()
    if lacking:
        raise BackendError(
            f"torch-neuronx {versions()['torch-neuronx']} lacks {', '.join(lacking)}: it is not "
            "the native TorchNeuron of SDK 2.33 or later.",
            mend=INSTALL,
        )
    return {name: os.environ[name] for name in variables}


def missing() -> list[str]:
    """What the installed package lacks of `SYMBOLS` and the compiler."""
    module = getattr(torch, DEVICE, None)
    lacking = [s for s in SYMBOLS if not callable(getattr(module, s.rpartition(".")[2], None))]
    if COMPILER not in torch.compiler.list_backends(exclude_tags=()):
        lacking.append(f"torch.compile(backend={COMPILER!r})")
    return lacking


def device_module() -> Any:
    """`torch.neuron`."""
    return torch.get_device_module(DEVICE)


def used_bytes() -> int:
    """What tensors hold of the device now. The allocator is asynchronous, so it is waited for."""
    device_module().synchronize()
    return int(device_module().memory_allocated())


def total_bytes() -> int:
    """Memory of the device as the driver says."""
    return int(device_module().get_device_properties().total_memory)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as one static graph of the vendor's compiler, made when it is first called; other
    shapes raise instead of a second compilation. A code object of its own, because torch counts
    (and bounds) the graphs of a process by code object.
    """
    assert isinstance(function, FunctionType)
    code, closure = function.__code__.replace(), function.__closure__
    own = FunctionType(code, function.__globals__, function.__name__, None, closure)
    made: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]  # untyped arguments
        own,
        backend=COMPILER,
        fullgraph=True,
        dynamic=False,
        isolate_recompiles=True,
        recompile_limit=1,
    )
    return made


def signature(tensor: Tensor) -> str:
    """Dtype and shape, all that a program depends on."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def versions() -> dict[str, str]:
    """Of all that makes or runs a program, "-" where it is not installed."""
    found = {}
    for name in ("tokenry", "tokenry-neuron", "torch", "torch-neuronx", "neuronx-cc"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found


def compiler_settings() -> dict[str, str]:
    """The user's variables that change what is compiled."""
    return {name: os.environ.get(name, "") for name in READ_ONLY}
