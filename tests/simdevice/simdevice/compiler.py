"""A static-shape dynamo backend: what a vendor's graph compiler refuses, then eager execution.

In: an FX graph from dynamo. Out: a callable that runs it as one program. Refuses dynamic shapes,
values that depend on data, and tensors of other devices; counts programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from simdevice.device import Device
from simdevice.errors import DynamicShape, VendorRefuses

Program = Callable[..., object]


def compile_static(
    device: Device,
    backend: str,
    graph: torch.fx.GraphModule,
    inputs: Sequence[object],
    *,
    cached: bool = False,
) -> Program:
    """One program of `graph`; `cached` says that a compiler would have found it on disk.

    Raises DynamicShape, VendorRefuses, NewProgram; dynamo wraps them into its
    BackendCompilerFailed.
    """
    for value in inputs:
        _check_static(backend, "an input", value)
        if isinstance(value, torch.Tensor) and value.device.type != device.name and value.dim() > 0:
            raise VendorRefuses(
                f"{backend}: an input of shape {tuple(value.shape)} is on {value.device}, "
                f"the program runs on {device.name}"
            )
    for node in graph.graph.nodes:
        _check_static(backend, f"{node.op} {node.target}", node.meta.get("example_value"))
    device.note_program(f"{backend}: a program of {len(graph.graph.nodes)} nodes", cached=cached)

    def run(*args: object) -> object:
        with device.program():
            return graph.forward(*args)

    return run


def _check_static(backend: str, what: str, value: object) -> None:
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise DynamicShape(f"{backend}: {what} is a number known only at run time")
    if isinstance(value, torch.Tensor) and any(isinstance(n, torch.SymInt) for n in value.shape):
        raise DynamicShape(f"{backend}: {what} has the dynamic shape {tuple(value.shape)}")
    if isinstance(value, tuple | list):
        for part in value:
            _check_static(backend, what, part)
