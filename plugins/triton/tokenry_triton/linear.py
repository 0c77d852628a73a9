"""The linear op: dense weights through the vendor's library, narrow ones through Triton.

In: x [T, in] and packed weights. Out: [T, out]. Dense weights take the Triton kernel too where the
bits of a row may not depend on how many rows there are (`deterministic`): libraries choose another
kernel for another number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from tokenry.backend.reference import ReferenceOp
from tokenry.errors import BackendError
from tokenry_triton.kernels import products as kernels
from tokenry_triton.launch import Arch, Tile
from tokenry_triton.quantize import Weight, dense, quantized
from tokenry_triton.rows import fits_dtype
from tokenry_triton.tune import Tuner

QUANT = frozenset({"int8", "int4", "fp8"})
FEW_ROWS = 16
"""Up to so many rows the `small` tile of the architecture is used."""


def tile_for(arch: Arch, rows: int, *, deterministic: bool, dtype: torch.dtype) -> Tile:
    """The launch for so many rows; float32 takes twice the memory, so half the inputs at a time."""
    tile = arch.small if deterministic or rows <= FEW_ROWS else arch.large
    if dtype != torch.float32:
        return tile
    return Tile(m=tile.m, n=min(64, tile.n), k=max(64, tile.k // 2), warps=tile.warps, stages=2)


def bucket_of(rows: int) -> int:
    """Rows as a tile's choice sees them: the next power of two, at least FEW_ROWS."""
    return max(FEW_ROWS, int(triton.next_power_of_2(rows)))


def narrowed(weight: Tensor, format: str, arch: Arch) -> Weight:
    """A weight in a format of QUANT; raises BackendError for fp8 where the device has none (Triton
    does not even read it there).
    """
    if format == "fp8" and arch.fp8 is None:
        raise BackendError(
            f"{arch.name} has no float8, so no fp8 weights.", mend="--quantization int8 or int4"
        )
    return quantized(weight, format, getattr(torch, arch.fp8 or "float8_e4m3fn"))


class Linear(ReferenceOp):
    """x @ weight.T + bias; `quantize` gives weights of int8, int4 (activations as they are) or fp8
    (activations too, a scale a row).
    """

    def __init__(
        self, arch: Arch, *, deterministic: bool = False, tuner: Tuner | None = None
    ) -> None:
        self._arch = arch
        self._deterministic = deterministic
        self._tuner = tuner

    def supports(self, **meta: Any) -> bool:
        """The three dtypes."""
        return fits_dtype(meta)

    def pack(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """As given."""
        return dict(weights)

    def quantize(self, weights: Mapping[str, Tensor], format: str) -> Mapping[str, Any]:
        """In a format of QUANT; the bias stays."""
        narrow = narrowed(weights["weight"], format, self._arch)
        return {"narrow": narrow, "bias": weights.get("bias")}

    def __call__(self, x: Tensor, weights: Mapping[str, Any]) -> Tensor:
        """[T, out]."""
        narrow: Weight | None = weights.get("narrow")
        bias: Tensor | None = weights.get("bias")
        if narrow is None:
            if not self._deterministic:
                return functional.linear(x, weights["weight"], bias)
            narrow = dense(weights["weight"])
        rows, outputs = x.shape[0], narrow.values.shape[0]
        y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
        fp8_rows = narrow.format == "fp8"
        x = x if x.stride(-1) == 1 else x.contiguous()
        tile = tile_for(self._arch, rows, deterministic=self._deterministic, dtype=x.dtype)
        scale = narrow.scales
        if fp8_rows:
            x, scale = scaled_rows(x, narrow.values.dtype)
        if not rows:
            return y

        def launch(tile: Tile) -> None:
            kernels.linear[(triton.cdiv(outputs, tile.n), triton.cdiv(rows, tile.m))](
                x, narrow.values, narrow.scales, narrow.scales if bias is None else bias, scale, y,
                x.stride(0), rows, outputs, narrow.size, narrow.stride, narrow.group,
                FORMAT=narrow.format, FP8_ROWS=fp8_rows, BIAS=bias is not None,
                M=tile.m, N=tile.n, K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

        if self._tuner is not None:
            shape = f"{narrow.format} {bucket_of(rows)}x{outputs}x{narrow.size} {x.dtype}"
            tile = self._tuner.pick("linear", shape, tile, launch)
        launch(tile)
        return y


def scaled_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Give x in float8 and the scale [T] float32 that takes each row back."""
    most = torch.finfo(dtype).max
    wide = x.float()
    scale = wide.abs().amax(-1).clamp_min(1e-12) / most
    return (wide / scale[:, None]).clamp(-most, most).to(dtype), scale
