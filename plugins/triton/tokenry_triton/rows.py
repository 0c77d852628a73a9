"""The ops that take rows one by one: rms_norm, rope, act_mul.

In: tensors as `tokenry.backend.base.Op` says, views with any stride but in the last dimension.
Out: contiguous ones. Knows nothing of architectures: these kernels wait for memory on all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from tokenry.backend.reference import ReferenceOp
from tokenry_triton.kernels import rows as kernels

DTYPES = frozenset({"float32", "float16", "bfloat16"})
KINDS = frozenset({"silu", "gelu", "gelu_tanh"})
MAX_ROW = 32768
"""Longest row that one program holds in registers."""
ROPE_HEADS = 8
"""Heads that one program turns."""


def fits_dtype(meta: dict[str, Any]) -> bool:
    """Whether a layer's dtype, if it says one, is one of the kernels'."""
    return meta.get("dtype", "float32") in DTYPES


def _even(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def row_warps(size: int) -> int:
    """Warps for a row of so many elements: about 8 elements a thread, at most 8 warps."""
    warps: int = triton.next_power_of_2(size) // 256
    return min(8, max(1, warps))


class RmsNorm(ReferenceOp):
    """x / rms(x) * weight, with the sum of a residual."""

    def supports(self, **meta: Any) -> bool:
        """Rows up to MAX_ROW."""
        return fits_dtype(meta) and int(meta.get("size", 1)) <= MAX_ROW

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or (y, x + residual); x [T, E] or [T, H, D]."""
        x = _even(x)
        size, heads = x.shape[-1], x.shape[1] if x.dim() == 3 else 1
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        other = x if residual is None else _even(residual)
        total = y if residual is None else torch.empty_like(y)
        if y.numel():
            kernels.rms_norm[(y.numel() // size,)](
                x, other, weight, y, total,
                x.stride(0), x.stride(1), other.stride(0), other.stride(1), heads, size, eps,
                HAS_RESIDUAL=residual is not None, BLOCK=triton.next_power_of_2(size),
                num_warps=row_warps(size),
            )  # fmt: skip
        return y if residual is None else (y, total)


class Rope(ReferenceOp):
    """Rotary embedding of q and k in one launch."""

    def supports(self, **meta: Any) -> bool:
        """Every head dim."""
        return fits_dtype(meta)

    def __call__(
        self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turned copies of q [T, H, D] and k [T, KH, D]; table [max_len, 2, rot/2]."""
        q, k, table = _even(q), _even(k), table.contiguous()
        tokens, q_heads, dim = q.shape
        k_heads, half = k.shape[1], table.shape[2]
        q_out = torch.empty((tokens, q_heads, dim), dtype=q.dtype, device=q.device)
        k_out = torch.empty((tokens, k_heads, dim), dtype=k.dtype, device=k.device)
        if tokens:
            heads = min(ROPE_HEADS, triton.next_power_of_2(max(q_heads, k_heads)))
            kernels.rope[(tokens, triton.cdiv(max(q_heads, k_heads), heads))](
                q, k, q_out, k_out, positions, table,
                q.stride(0), k.stride(0), q.stride(1), k.stride(1), q_heads, k_heads,
                HALF=half, DIM=dim, HEADS=heads, HALF_BLOCK=triton.next_power_of_2(half),
                REST_BLOCK=triton.next_power_of_2(max(1, dim - 2 * half)), num_warps=4,
            )  # fmt: skip
        return q_out, k_out


class ActMul(ReferenceOp):
    """kind(gate) * up."""

    def supports(self, **meta: Any) -> bool:
        """The three activations."""
        return fits_dtype(meta) and meta.get("kind", "silu") in KINDS

    def __call__(self, x: Tensor, kind: str) -> Tensor:
        """[T, I] = kind(x[:, :I]) * x[:, I:]."""
        if kind not in KINDS:
            raise ValueError(f"unknown activation {kind!r}: {', '.join(sorted(KINDS))}")
        x = _even(x)
        tokens, size = x.shape[0], x.shape[1] // 2
        y = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
        block = min(2048, triton.next_power_of_2(size))
        if y.numel():
            kernels.act_mul[(tokens, triton.cdiv(size, block))](
                x, y, x.stride(0), size, KIND=kind, BLOCK=block, num_warps=4
            )
        return y
