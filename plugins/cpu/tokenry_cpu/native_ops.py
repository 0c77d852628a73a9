"""The native kernels as ops of the contract: dtypes and layouts are made fit here.

Every kernel works in float32 and adds up each output in one order that knows nothing of the batch
(see csrc/linear.inl, csrc/attention.inl): the same bits for a row alone, among others, in chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenry.backend.base import Op, SampleInputs, StepBatch
from tokenry.backend.contract import KVSpec
from tokenry.backend.reference import ReferenceOp
from tokenry_cpu import native
from tokenry_cpu.abi import AttentionCall
from tokenry_cpu.moe import RowMoe
from tokenry_cpu.pack_cache import PackCache

QUANT = frozenset({"int8", "int4"})
"""int8: one scale an output channel; int4: one for 64 inputs of a channel."""


def ops() -> Mapping[str, Op]:
    """The kernels by name."""
    linear = Linear()
    return {
        "attention": Attention(),
        "linear": linear,
        "rms_norm": RmsNorm(),
        "rope": Rope(),
        "act_mul": ActMul(),
        "moe": RowMoe(linear),
        "sample": Sample(),
    }


def kv_shape(spec: KVSpec, num_blocks: int) -> tuple[int, ...]:
    """One layer's KV, as `native.kv_shape`; spec.dtype may be int8."""
    dtype = getattr(torch, spec.dtype)
    return native.kv_shape(num_blocks, spec.num_kv_heads, spec.head_dim, spec.block_size, dtype)


class Linear(ReferenceOp):
    """x @ weight.T + bias on packed weights."""

    round_activations = False
    """Set by the backend for a model in bfloat16: where the kernels have the instruction, what
    bfloat16 weights multiply is rounded to bfloat16 once; sums are float32 always.
    """
    takes_narrow = True
    cache: PackCache | None = None
    """Set by the backend while it builds a model whose packed weights are kept on disk."""

    def pack(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """In the narrowest float format that loses nothing: a checkpoint in bfloat16 or float16
        stays in 16 bits.
        """
        weight = weights["weight"]
        if self.round_activations:  # the model is in bfloat16, whatever its parts were read as
            weight = weight.bfloat16()
        narrow = native.narrowest(weight)
        name = native.name_of(narrow.dtype)
        if name == "bfloat16" and self.round_activations and native.bf16_dots():
            name = "bfloat16_dots"
        return {"packed": self._packed(narrow, weights.get("bias"), name)}

    def quantize(self, weights: Mapping[str, Tensor], format: str) -> Mapping[str, Any]:
        """In `QUANT`'s formats; activations are then quantised to 8 bits in each call, per row for
        int8, per row and 64 inputs for int4.
        """
        weight = weights["weight"].float()
        return {"packed": self._packed(weight, weights.get("bias"), format)}

    def _packed(self, weight: Tensor, bias: Tensor | None, format: str) -> native.Weight:
        if self.cache is not None:
            return self.cache.weight(weight, bias, format)
        return native.Weight(weight, bias, format)

    def __call__(self, x: Tensor, weights: Mapping[str, Any]) -> Tensor:
        """[T, out]."""
        packed: native.Weight = weights["packed"]
        if x.dtype != torch.float32:
            return packed(x.float()).to(x.dtype)
        return packed(x if x.stride(-1) == 1 else x.contiguous())


class RmsNorm(ReferenceOp):
    """x / rms(x) * weight."""

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Any:
        """As `base.Op`."""
        rows = _rows(x)
        weight = weight if weight.dtype == torch.float32 else weight.float()
        other = None if residual is None else _rows(residual).contiguous()
        y, total = native.rms_norm(rows, weight.contiguous(), eps, other)
        if x.dtype != torch.float32:
            y, total = y.to(x.dtype), None if total is None else total.to(x.dtype)
        return y if total is None else (y, total)


class Rope(ReferenceOp):
    """Rotary embedding."""

    def __call__(
        self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `base.Op`."""
        turned = native.rope(_rows(q), _rows(k), positions.int(), table.float().contiguous())
        if q.dtype == torch.float32:
            return turned
        return turned[0].to(q.dtype), turned[1].to(k.dtype)


class ActMul(ReferenceOp):
    """kind(gate) * up."""

    def supports(self, **meta: Any) -> bool:
        """Of the three activations."""
        return meta.get("kind", "silu") in native.ACTIVATIONS

    def __call__(self, x: Tensor, kind: str) -> Tensor:
        """As `base.Op`."""
        y = native.act_mul(x.float().contiguous(), kind)
        return y if x.dtype == torch.float32 else y.to(x.dtype)


class Attention(ReferenceOp):
    """Attention over the blocks where they lie: kv_layer as `kv_shape`."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_layer: Tensor,
        batch: StepBatch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """[T, num_heads * head_dim]; k and v are written to the slots of the batch."""
        tokens, heads, head_dim = q.shape
        rows = [_rows(t) for t in (q, k, v)]
        out = torch.zeros((tokens, heads * head_dim))
        table = batch.block_table
        call = AttentionCall(
            *(t.data_ptr() for t in rows),
            *(t.stride(0) for t in rows),
            kv_layer.data_ptr(),
            out.data_ptr(),
            batch.q_start.data_ptr(),
            batch.q_lens.data_ptr(),
            batch.seq_lens.data_ptr(),
            table.data_ptr(),
            batch.slots.data_ptr(),
            tokens,
            batch.q_lens.shape[0],
            table.shape[1],
            heads,
            k.shape[1],
            head_dim,
            native.block_size_of(kv_layer, head_dim),
            scale,
            softcap or 0.0,
            window or 0,
            native.KV_FORMATS[kv_layer.dtype],
        )
        native.attention(call)
        if (listener := native.listener()) is not None:
            rule = {"scale": scale, "softcap": softcap or 0.0, "window": window or 0}
            listener.attention(*rows, kv_layer, out, **rule)
        return out if q.dtype == torch.float32 else out.to(q.dtype)


class Sample(ReferenceOp):
    """Draws without sorting the vocabulary, and sees in the same pass whether a row is broken."""

    def __call__(self, logits: Tensor, inputs: SampleInputs) -> Tensor:
        """[R] int32, as the reference op says."""
        return self.checked(logits, inputs)[0]

    def checked(self, logits: Tensor, inputs: SampleInputs) -> tuple[Tensor, Tensor]:
        """Ids, and which rows are broken: see `Op`."""
        temperature = inputs.temperature
        if inputs.all_greedy:
            temperature = _zeros(temperature.shape[0])
        return native.sample(
            logits.float().contiguous(),
            temperature.contiguous(),
            inputs.top_k.contiguous(),
            inputs.top_p.contiguous(),
            inputs.min_p.contiguous(),
            inputs.uniform.contiguous(),
        )


@functools.lru_cache(64)
def _zeros(rows: int) -> Tensor:
    return torch.zeros(rows)


def _rows(x: Tensor) -> Tensor:
    """Float32, contiguous in all but the first dimension."""
    if x.dtype != torch.float32:
        return x.float().contiguous()
    inner = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if stride != inner and size != 1:
            return x.contiguous()
        inner *= size
    return x
