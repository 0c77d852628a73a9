"""The dynamo backend `hpu_backend`: static shapes, one program for each graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import simdevice
import torch
from simdevice.compiler import compile_static


def hpu_backend(
    graph: torch.fx.GraphModule, inputs: Sequence[object], **options: object
) -> Callable[..., object]:
    """Compiles `graph`; options as `force_static_compile` are taken and change nothing here."""
    return compile_static(simdevice.current(), "hpu_backend", graph, inputs)
