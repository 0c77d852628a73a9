"""Mixture of experts over any linear kernel: each expert computes the rows that chose it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenry.backend.base import Op
from tokenry.backend.reference import ReferenceOp, activation, route


class RowMoe(ReferenceOp):
    """Rows gathered by expert, `linear` on each; what a row gets does not depend on the others."""

    def __init__(self, linear: Op) -> None:
        self._linear = linear

    def pack(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Each expert's two weights, packed."""
        return _each(weights, self._linear.pack)

    def quantize(self, weights: Mapping[str, Tensor], format: str) -> Mapping[str, Any]:
        """The same in a quantised format of the linear kernel."""
        quantize = getattr(self._linear, "quantize")  # noqa: B009 - only where caps.quant says so
        return _each(weights, lambda one: quantize(one, format))

    def __call__(
        self,
        x: Tensor,
        router_logits: Tensor,
        weights: Mapping[str, Any],
        *,
        top_k: int,
        renormalize: bool,
        kind: str,
    ) -> Tensor:
        """[T, E]; the experts of a row are added in the order of their numbers."""
        gates = route(router_logits, top_k, renormalize)
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in gates.any(0).nonzero()[:, 0].tolist():
            rows = gates[:, expert].nonzero()[:, 0]
            gate, up = self._linear(x[rows], weights["w13"][expert]).float().chunk(2, dim=-1)
            hidden = (activation(gate, kind) * up).to(x.dtype)
            y = self._linear(hidden, weights["w2"][expert]).float()
            out[rows] += y * gates[rows, expert, None]
        return out.to(x.dtype)


def _each(
    weights: Mapping[str, Tensor], pack: Callable[[Mapping[str, Tensor]], Mapping[str, Any]]
) -> Mapping[str, Any]:
    return {name: [pack({"weight": e}) for e in weights[name].unbind(0)] for name in ("w13", "w2")}
