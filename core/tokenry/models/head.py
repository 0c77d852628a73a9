"""What follows the pooling of a text's hidden rows: the layers of a head, and the last function.

In: `PoolingPlan`, data of `plan_pooling`. Out: `Head`, which runs on the host in float32, one row
at a time, so that a row's result does not depend on its batch. Knows nothing of requests but
`PoolingParams`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tokenry.errors import ModelLoadError
from tokenry.models.encoder import Method
from tokenry.models.weights import open_checkpoint, read_tensor
from tokenry.pooling import PairTemplate, PoolingParams

Floats = NDArray[np.float32]
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
}
"""Of the layers of a head; sentence-transformers writes the names of torch's classes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLayer:
    """x -> norm(act(W x + b)). name: of the tensors in `folder`'s files. norm: name of a LayerNorm,
    "" if there is none. rows: W is the second of these rows of the tensor less the first.
    """

    name: str
    folder: Path
    in_size: int
    out_size: int
    act: str = "identity"
    bias: bool = True
    norm: str = ""
    norm_eps: float = 1e-5
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingPlan:
    """What a model gives instead of, or beside, tokens.

    task        embed: a vector; classify: a value for each label (one label: a score).
    method      which rows are taken.
    normalize   embeddings have length 1 unless a request wants them raw.
    head        layers after the pooling.
    act         what turns a classifier's values into probabilities: sigmoid, softmax or identity.
    width       of the result.       labels  names of a classifier's values.
    template    how a pair of texts becomes one, None: as the tokenizer says.
    matryoshka  sizes that `dimensions` may ask for; (): any up to the width; None: none.
    notes       lines for the start-up log.
    """

    task: Literal["embed", "classify"]
    method: Method
    width: int
    normalize: bool = True
    head: tuple[HeadLayer, ...] = ()
    act: str = "identity"
    labels: tuple[str, ...] = ()
    matryoshka: tuple[int, ...] | None = None
    template: PairTemplate | None = None
    notes: tuple[str, ...] = ()


class Head:
    """The layers after the pooling, on the host."""

    def __init__(self, plan: PoolingPlan, *, dummy: bool = False) -> None:
        """Reads the tensors. Raises ModelLoadError for one that is missing or misshapen."""
        self._plan = plan
        self.method: Method = plan.method
        self._layers = [(layer, *_tensors(layer, dummy)) for layer in plan.head]

    def __call__(self, row: Tensor) -> Tensor:
        """[in] float32 -> [width] float32."""
        for layer, weight, bias, norm in self._layers:
            row = ACTIVATIONS[layer.act](functional.linear(row, weight, bias))
            if norm is not None:
                row = functional.layer_norm(row, (layer.out_size,), norm, None, layer.norm_eps)
        return row

    def finish(self, row: Floats, params: PoolingParams) -> Floats:
        """A pooled row [hidden] as its request wants it: an embedding cut and of length 1, or a
        classifier's probabilities.
        """
        plan = self._plan
        values = self(torch.tensor(row))
        if plan.task == "classify":
            if params.final is False:
                return values.numpy()
            if plan.act == "softmax":
                return torch.softmax(values, 0).numpy()
            return ACTIVATIONS[plan.act](values).numpy()
        values = values[: params.dimensions]
        if plan.normalize if params.final is None else params.final:
            values = functional.normalize(values, dim=0)
        return values.numpy()


def _tensors(layer: HeadLayer, dummy: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    shape = (layer.out_size, layer.in_size)
    if dummy:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator) * 0.02, None, None
    checkpoint = open_checkpoint(layer.folder)

    def read(name: str, wanted: tuple[int, ...]) -> Tensor:
        tensor = read_tensor(checkpoint, name)
        if tuple(tensor.shape) != wanted:
            raise ModelLoadError(
                f"{checkpoint.where(name)}: the tensor {name} has shape {list(tensor.shape)}, "
                f"{list(wanted)} is needed.",
                mend="are the configuration and the weights of one model?",
            )
        return tensor.float()

    if layer.rows is not None:
        matrix = read_tensor(checkpoint, f"{layer.name}.weight")
        less, more = matrix[list(layer.rows)].float()
        return (more - less)[None], None, None
    bias = read(f"{layer.name}.bias", shape[:1]) if layer.bias else None
    norm = read(f"{layer.norm}.weight", shape[:1]) if layer.norm else None
    return read(f"{layer.name}.weight", shape), bias, norm
