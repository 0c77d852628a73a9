"""Weights in fewer bits: int8 and float8 with one scale an output, int4 with one for 32 inputs.

In: weights [out, in] (or [experts, out, in]). Out: what the kernels of products.py read. Runs once,
at load, in plain torch on the device of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
"""Inputs that share a scale of int4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Packed weights [..., out, stride] and their scales; size: inputs; group: scales of a row."""

    format: str
    values: Tensor
    scales: Tensor
    size: int
    group: int

    @property
    def stride(self) -> int:
        """Elements of one output."""
        return self.values.shape[-1]


def dense(weight: Tensor) -> Weight:
    """As it is; no scales."""
    weight = weight.contiguous()
    return Weight(format="dense", values=weight, scales=weight, size=weight.shape[-1], group=0)


def quantized(weight: Tensor, format: str, fp8: torch.dtype) -> Weight:
    """In int8, int4 or fp8 (of the given encoding); raises ValueError for another format."""
    wide = weight.float()
    if format == "int4":
        return _four_bits(wide)
    if format not in {"int8", "fp8"}:
        raise ValueError(f"unknown format {format!r}: int8, int4, fp8")
    most = 127.0 if format == "int8" else torch.finfo(fp8).max
    scales = wide.abs().amax(-1).clamp_min(1e-12) / most
    scaled = (wide / scales[..., None]).clamp(-most, most)
    values = scaled.round().to(torch.int8) if format == "int8" else scaled.to(fp8)
    return Weight(
        format=format, values=values.contiguous(), scales=scales.contiguous(),
        size=weight.shape[-1], group=1,
    )  # fmt: skip


def _four_bits(wide: Tensor) -> Weight:
    """Rows padded with 0 to pairs of groups; low halves of bytes hold a pair's first group."""
    size = wide.shape[-1]
    padded = torch.nn.functional.pad(wide, (0, -size % (2 * GROUP)))
    groups = padded.view(*padded.shape[:-1], padded.shape[-1] // GROUP, GROUP)
    scales = _best_scales(groups)
    divisor = torch.where(scales == 0, 1.0, scales)[..., None]
    levels = ((groups / divisor).round().clamp(-8, 7) + 8).to(torch.uint8)
    pairs = levels.view(*levels.shape[:-2], levels.shape[-2] // 2, 2, GROUP)
    values = (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).flatten(-2)
    return Weight(
        format="int4", values=values.contiguous(), scales=scales.contiguous(), size=size,
        group=scales.shape[-1],
    )  # fmt: skip


def _best_scales(groups: Tensor) -> Tensor:
    """[...] scale of each group with the least squared error among some: the largest value, with
    its sign, goes to level -8 or somewhat beyond (as the CPU plugin chooses).
    """
    index = groups.abs().argmax(-1, keepdim=True)
    largest = groups.gather(-1, index)[..., 0]
    best = torch.zeros_like(largest)
    least = groups.square().sum(-1)
    for step in range(-8, 9):
        scale = -largest / (8.0 + 0.15 * step)
        divisor = torch.where(scale == 0, 1.0, scale)[..., None]
        levels = (groups / divisor).round().clamp(-8, 7)
        norm = levels.square().sum(-1).clamp_min(1e-30)
        fitted = (levels * groups).sum(-1) / norm
        error = (groups - levels * fitted[..., None]).square().sum(-1)
        better = error < least
        best, least = torch.where(better, fitted, best), torch.where(better, error, least)
    return best
