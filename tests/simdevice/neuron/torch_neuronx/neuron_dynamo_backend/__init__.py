"""The dynamo backend `neuron`: static shapes, and a cache of compiled graphs on disk.

What the documentation says and is kept here: dynamic=True is rejected; a new shape is a new
program; host tensors in a program are copied to the device unless
TORCH_NEURONX_DYNAMO_DISABLE_CPU_AUTOCOPY=1, then they raise. With TORCH_NEURONX_NEFF_CACHE_DIR each
program leaves a file named by its graph, shapes and compiler settings; a program whose file is
there counts as cached. With TORCH_NEURONX_COMPILE_ONLY=1 results are poison.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import simdevice
import torch
from simdevice.compiler import compile_static
from torch.utils._pytree import tree_map_only

SETTINGS = ("NEURON_CC_FLAGS", "NEURON_COMPILER_OPT_LEVEL", "NEURON_LOGICAL_NC_CONFIG")


@dataclass(frozen=True, slots=True)
class GraphMetrics:
    """One compiled graph, as `get_dynamo_metrics` lists it."""

    graph_name: str
    graph_node_count: int
    torch_neuronx_compile_us: int


_metrics: list[GraphMetrics] = []


def get_dynamo_metrics() -> list[GraphMetrics]:
    """One entry for each graph that was compiled or loaded."""
    return list(_metrics)


def reset_dynamo_metrics() -> None:
    """Forgets all entries."""
    _metrics.clear()


def neuron_backend(
    graph: torch.fx.GraphModule, inputs: Sequence[object], **options: object
) -> Callable[..., object]:
    """One program of `graph`."""
    name = _graph_name(graph, inputs)
    file = _cache_file(name)
    on_host = [i for i, value in enumerate(inputs) if _is_host_tensor(value)]
    if on_host and os.environ.get("TORCH_NEURONX_DYNAMO_DISABLE_CPU_AUTOCOPY") == "1":
        raise simdevice.VendorRefuses(f"neuron: inputs {on_host} are on the host")
    moved = [_on_device(value) if i in on_host else value for i, value in enumerate(inputs)]
    cached = file is not None and file.exists()
    program = compile_static(simdevice.current(), "neuron", graph, moved, cached=cached)
    if file is not None and not cached:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(graph.code)
    _metrics.append(GraphMetrics(name, len(graph.graph.nodes), 0))
    compile_only = os.environ.get("TORCH_NEURONX_COMPILE_ONLY") == "1"

    def run(*args: object) -> object:
        values = [_on_device(v) if i in on_host else v for i, v in enumerate(args)]
        results = program(*values)
        return tree_map_only(torch.Tensor, _poisoned, results) if compile_only else results

    return run


def _is_host_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim() > 0


def _on_device(value: object) -> object:
    return value.to("neuron") if isinstance(value, torch.Tensor) else value


def _poisoned(result: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(
        result.shape, result.stride(), dtype=result.dtype, device=result.device
    )


def _graph_name(graph: torch.fx.GraphModule, inputs: Sequence[object]) -> str:
    shapes = [
        f"{value.dtype}{tuple(value.shape)}{value.stride()}"
        if isinstance(value, torch.Tensor)
        else repr(value)
        for value in inputs
    ]
    settings = [f"{key}={os.environ.get(key, '')}" for key in SETTINGS]
    text = "\n".join([graph.code, *shapes, *settings])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _cache_file(name: str) -> Path | None:
    folder = os.environ.get("TORCH_NEURONX_NEFF_CACHE_DIR")
    return Path(folder) / f"{name}.neff" if folder else None
