"""All that this plugin uses of the vendor's software, each with its signature and source, and the
few calls through which the other files reach it.

In: variables to be set. Out: the loaded package, memory in use, versions. Knows nothing of models.
`SYMBOLS` and `VARIABLES` are the whole list; `missing()` compares it with what is installed.
Sources: "reference" = the vendor's torch.compile backend reference and environment variables pages
(SDK 2.33); "module" = the public source of the device module `torch.neuron`; "plugin" = the
vendor's own serving plugin for vLLM.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from tokenry.errors import BackendError
from tokenry_neuron import INSTALL, PACKAGE

DEVICE = "neuron"
COMPILER = "neuron"
"""The device type and the name of the torch.compile backend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Symbol:
    """A function or attribute of the vendor, as it is called here."""

    path: str
    signature: str
    source: str


SYMBOLS = (
    Symbol(path="torch.neuron.synchronize", signature="(device=None) -> None", source="module"),
    Symbol(path="torch.neuron.memory_allocated", signature="(device=None) -> int", source="module"),
    Symbol(
        path="torch.neuron.get_device_properties",
        signature="(device=None) -> object with total_memory: int",
        source="module",
    ),
)
VARIABLES: Mapping[str, str] = {
    "TORCH_NEURONX_NEFF_CACHE_DIR": "where compiled graphs are kept; reference",
    "TORCH_NEURONX_COMPILE_ONLY": "1: compile without a device; plugin",
    "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION": "1: a failed program raises; reference",
    "TORCH_NEURONX_DYNAMO_DISABLE_CPU_AUTOCOPY": "1: host tensors raise; reference",
    "NEURON_PLATFORM_TARGET_OVERRIDE": "chip to compile for without a device; plugin",
    "NEURON_CC_FLAGS": "flags of the compiler, read only; reference",
    "NEURON_COMPILER_OPT_LEVEL": "level of the compiler, read only; plugin",
    "NEURON_LOGICAL_NC_CONFIG": "physical cores of a logical one, read only; plugin",
}
READ_ONLY = ("NEURON_CC_FLAGS", "NEURON_COMPILER_OPT_LEVEL", "NEURON_LOGICAL_NC_CONFIG")


def connect(variables: Mapping[str, str]) -> dict[str, str]:
    """Load the package with these variables, the user's own values going first; gives the values
    that hold. Raises BackendError where it is missing or is not the native backend.
    """
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    try:
        importlib.import_module(PACKAGE)
    except ImportError as error:
        raise BackendError(
            f"torch-neuronx cannot be imported: {' '.join(str(error).split())}.", mend=INSTALL
        ) from error
    lacking = missing()
    if lacking:
        raise BackendError(
            f"torch-neuronx {versions()['torch-neuronx']} lacks {', '.join(lacking)}: it is not "
            "the native TorchNeuron of SDK 2.33 or later.",
            mend=INSTALL,
        )
    return {name: os.environ[name] for name in variables}


def missing() -> list[str]:
    """Symbols that the installed package lacks, and the compiler if it is not registered."""
    lacking = [symbol.path for symbol in SYMBOLS if not _has(symbol.path)]
    if COMPILER not in torch.compiler.list_backends(exclude_tags=()):
        lacking.append(f"torch.compile(backend={COMPILER!r})")
    return lacking


def _has(path: str) -> bool:
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name, None)
    return callable(found)


def device_module() -> Any:
    """`torch.neuron`."""
    return torch.get_device_module(DEVICE)


def used_bytes() -> int:
    """What tensors hold of the device now. The allocator is asynchronous, so it is waited for."""
    module = device_module()
    module.synchronize()
    return int(module.memory_allocated())


def total_bytes() -> int:
    """Memory of the device as the driver says."""
    return int(device_module().get_device_properties().total_memory)


def compiled(function: Any, name: str) -> Any:
    """`function` as one static graph of the vendor's compiler, made when it is first called; other
    shapes raise instead of a second compilation.
    """
    return torch.compile(  # type: ignore[call-overload]  # torch 2.13 types only some of them
        function,
        backend=COMPILER,
        fullgraph=True,
        dynamic=False,
        name=name,
        isolate_recompiles=True,
        recompile_limit=1,
    )


def versions() -> dict[str, str]:
    """Of everything that makes or runs a program; "-" where it is not installed."""
    names = ("tokenry", "tokenry-neuron", "torch", "torch-neuronx", "neuronx-cc")
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def compiler_settings() -> dict[str, str]:
    """The user's variables that change what is compiled."""
    return {name: os.environ.get(name, "") for name in READ_ONLY}


def signature(tensors: Sequence[Tensor]) -> list[str]:
    """Dtype and shape of each, as the compiler sees them."""
    return [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors]
