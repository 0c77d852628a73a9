"""The moe op: rows sorted by expert on the device, two grouped products, the parts added by row.

In: x [T, E], router logits [T, N]. Out: [T, E]. The number of tiles follows from T, top_k and N
alone, so nothing waits for the device; tiles without rows do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from tokenry.backend.reference import ReferenceOp
from tokenry_triton.kernels import products as kernels
from tokenry_triton.launch import Arch, Tile
from tokenry_triton.linear import bucket_of, narrowed, tile_for
from tokenry_triton.quantize import Weight, dense
from tokenry_triton.rows import KINDS, fits_dtype
from tokenry_triton.tune import Launch, Tuner


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """Which experts the rows go to. order: slots (row * top_k + i) by expert; starts [N + 1]: where
    each expert's begin; gates [T * top_k] float32, by slot.
    """

    order: Tensor
    starts: Tensor
    gates: Tensor
    experts: int
    chosen: int


class Moe(ReferenceOp):
    """Mixture of experts as a grouped product; each row's sum starts with its likeliest expert."""

    def __init__(
        self, arch: Arch, *, deterministic: bool = False, tuner: Tuner | None = None
    ) -> None:
        self._arch = arch
        self._deterministic = deterministic
        self._tuner = tuner

    def supports(self, **meta: Any) -> bool:
        """The three activations."""
        return fits_dtype(meta) and meta.get("kind", "silu") in KINDS

    def pack(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """{"w13": [N, 2I, E], "w2": [N, E, I]} as they are."""
        return {name: dense(weights[name]) for name in ("w13", "w2")}

    def quantize(self, weights: Mapping[str, Tensor], format: str) -> Mapping[str, Any]:
        """In a format of `linear.QUANT`; activations stay as they are."""
        return {name: narrowed(weights[name], format, self._arch) for name in ("w13", "w2")}

    def __call__(
        self,
        x: Tensor,
        router_logits: Tensor,
        weights: Mapping[str, Weight],
        *,
        top_k: int,
        renormalize: bool,
        kind: str,
    ) -> Tensor:
        """[T, E]."""
        x = x if x.stride(-1) == 1 else x.contiguous()
        rows, width = x.shape
        y = torch.empty((rows, width), dtype=x.dtype, device=x.device)
        if not rows:
            return y
        routes = route(router_logits, top_k, renormalize)
        slots = rows * top_k
        fair = triton.cdiv(slots, routes.experts)  # rows of an expert, were they even
        tile = tile_for(self._arch, fair, deterministic=self._deterministic, dtype=x.dtype)
        hidden = self._up(x, weights["w13"], routes, tile, kind)
        parts = self._down(hidden, weights["w2"], routes, tile)
        block = min(1024, triton.next_power_of_2(width))
        kernels.add_up[(rows, triton.cdiv(width, block))](
            parts, y, width, CHOSEN=top_k, BLOCK=block, num_warps=4
        )
        return y

    def _up(self, x: Tensor, w: Weight, routes: Routes, tile: Tile, kind: str) -> Tensor:
        """[T * top_k, I], by expert."""
        inner, slots = w.values.shape[1] // 2, x.shape[0] * routes.chosen
        hidden = torch.empty((slots, inner), dtype=x.dtype, device=x.device)

        def launch(tile: Tile) -> None:
            n = max(16, tile.n // 2)  # it holds two sums
            tiles = triton.cdiv(slots, tile.m) + routes.experts
            kernels.expert_up[(triton.cdiv(inner, n), tiles)](
                x, w.values, w.scales, routes.order, routes.starts, hidden, x.stride(0),
                routes.experts, routes.experts.bit_length(), routes.chosen, inner, w.size,
                w.stride, w.group, KIND=kind, FORMAT=w.format, M=tile.m, N=n, K=tile.k,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

        self._launch("up", w, routes, tile, hidden, launch)
        return hidden

    def _down(self, hidden: Tensor, w: Weight, routes: Routes, tile: Tile) -> Tensor:
        """[T * top_k, E] float32, by slot."""
        slots, outputs = hidden.shape[0], w.values.shape[1]
        parts = torch.empty((slots, outputs), dtype=torch.float32, device=hidden.device)

        def launch(tile: Tile) -> None:
            tiles = triton.cdiv(slots, tile.m) + routes.experts
            kernels.expert_down[(triton.cdiv(outputs, tile.n), tiles)](
                hidden, w.values, w.scales, routes.order, routes.starts, routes.gates, parts,
                routes.experts, routes.experts.bit_length(), outputs, w.size, w.stride, w.group,
                FORMAT=w.format, M=tile.m, N=tile.n, K=tile.k,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

        self._launch("down", w, routes, tile, hidden, launch)
        return parts

    def _launch(
        self, name: str, w: Weight, routes: Routes, tile: Tile, hidden: Tensor, launch: Launch
    ) -> None:
        """With the table's tile, or the tuner's."""
        if self._tuner is not None:
            fair = bucket_of(triton.cdiv(hidden.shape[0], routes.experts))
            sizes = f"{routes.experts}x{fair}x{w.values.shape[1]}x{w.size}"
            tile = self._tuner.pick(
                f"moe {name}", f"{w.format} {sizes} {hidden.dtype}", tile, launch
            )
        launch(tile)


def route(router_logits: Tensor, top_k: int, renormalize: bool) -> Routes:
    """The top_k softmax weights of each row, of equals the lower expert, and their slots sorted."""
    experts = router_logits.shape[1]
    p = torch.softmax(router_logits.float(), dim=-1)
    gates, chosen = torch.sort(p, dim=-1, descending=True, stable=True)
    gates, chosen = gates[:, :top_k], chosen[:, :top_k].reshape(-1)
    if renormalize:
        gates = gates / gates.sum(-1, keepdim=True)
    ranked, order = torch.sort(chosen, stable=True)
    edges = torch.arange(experts + 1, device=ranked.device)
    return Routes(
        order=order.to(torch.int32), starts=torch.searchsorted(ranked, edges).to(torch.int32),
        gates=gates.reshape(-1).contiguous(), experts=experts, chosen=top_k,
    )  # fmt: skip
