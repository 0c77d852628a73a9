"""A device under any name: `torch.<name>`, with graphs, and the dynamo backend `<name>`.

In: $SIMDEVICE_NAME. Loaded by the entry points that `processes.environment` writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from simdevice.compiler import compile_static
from simdevice.device import current
from simdevice.graph import Graph
from simdevice.module import functions
from simdevice.private import attach_private, serve


def load() -> None:
    """The `torch.backends` entry point."""
    name = os.environ["SIMDEVICE_NAME"]
    device = attach_private(name)
    serve(name, {**functions(device, title=f"simulated {name}"), "Graph": Graph})


def compile_program(
    graph: torch.fx.GraphModule, inputs: Sequence[object], **options: object
) -> Callable[..., object]:
    """The dynamo backend of that name; static shapes."""
    device = current()
    return compile_static(device, device.name, graph, inputs)
