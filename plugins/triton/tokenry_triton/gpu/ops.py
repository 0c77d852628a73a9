"""Kernels in plain torch for a GPU: matrix products in the model's dtype (or FP8), torch's fused
attention over gathered blocks. Where Triton's kernels are installed, these are what they leave.

In: tensors on the device, shapes as in `base.Op`. Out: the same as the reference ops within the
dtype's tolerance. Nothing waits for the device and every shape follows from the batch's, so that a
step can be captured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenry.backend import reference
from tokenry.backend.base import Op, StepBatch
from tokenry.backend.reference import ActMul, ReferenceOp, Rope, Sample, activation, route

GATHERED = 2**24
"""Bound on the gathered keys' elements of one slice of rows (32 MiB in bfloat16)."""
LOOPED_SEQS = 8
"""Up to so many requests attention goes request by request; more are cheaper row by row."""
FP8: Mapping[str, torch.dtype] = {
    "e4m3fn": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
}
FP8_STEP = 16
"""torch._scaled_mm wants both sides of a weight to be multiples of it."""
FP8_LEAST_ROWS = 256
"""Weights with fewer output rows (routers of experts) stay in the model's dtype."""


class Attention(ReferenceOp):
    """Writes the KV, gathers the blocks, scaled_dot_product_attention with a mask.

    Its cost follows the width of the block table, not the lengths: on captured steps that is the
    longest context that the engine was started for.
    """

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
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[T, num_heads * head_dim]; kv_layer [2, num_blocks, block_size, num_kv_heads, D]."""
        reference.write_kv(k, v, kv_layer, batch.slots)
        T, S = batch.bucket.tokens, batch.bucket.seqs
        rows = torch.arange(T, device=q.device, dtype=batch.q_start.dtype)
        owner = torch.searchsorted(batch.q_start, rows, right=True).sub(1).clamp(0, S - 1)
        live = rows - batch.q_start[owner] < batch.q_lens[owner]
        rule = reference.ScoreRule(scale=scale, window=window, softcap=softcap, sinks=sinks)
        attend = _by_request if S <= LOOPED_SEQS else _by_row
        out = attend(q, kv_layer, batch, owner, rule)
        return torch.where(live[:, None], out.flatten(1), 0.0).to(q.dtype)


def _by_request(
    q: Tensor, kv_layer: Tensor, batch: StepBatch, owner: Tensor, rule: reference.ScoreRule
) -> Tensor:
    """[T, H, D]: each request's keys against all rows, kept where the row is its own."""
    out = torch.zeros_like(q)
    for i in range(batch.bucket.seqs):
        lens = batch.seq_lens[i : i + 1]
        keys, values = _gather(kv_layer, batch.block_table[i : i + 1], lens, q.dtype)
        seen = _seen(batch.positions, keys.shape[1], rule.window)
        one = _attend(q[None], keys, values, seen[None], rule)[0]
        out = torch.where((owner == i)[:, None, None], one, out)
    return out


def _by_row(
    q: Tensor, kv_layer: Tensor, batch: StepBatch, owner: Tensor, rule: reference.ScoreRule
) -> Tensor:
    """[T, H, D]: each row with its own gathered keys, in slices of bounded memory."""
    length = batch.block_table.shape[1] * kv_layer.shape[2]
    step = max(1, GATHERED // (length * kv_layer.shape[3] * kv_layer.shape[4]))
    parts = []
    for at in range(0, q.shape[0], step):
        own = owner[at : at + step]
        table, lens = batch.block_table[own], batch.seq_lens[own]
        keys, values = _gather(kv_layer, table, lens, q.dtype)
        seen = _seen(batch.positions[at : at + step], length, rule.window)
        parts.append(_attend(q[at : at + step, None], keys, values, seen[:, None], rule)[:, 0])
    return torch.cat(parts)


def _gather(
    kv_layer: Tensor, table: Tensor, lens: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [S, L, KH, D], 0 past a request's end: what a block held before may be
    NaN.
    """
    both = kv_layer[:, table.long()].flatten(2, 3)
    live = torch.arange(both.shape[2], device=both.device) < lens[:, None]
    both = torch.where(live[None, :, :, None, None], both, 0.0).to(dtype)
    return both[0], both[1]


def _seen(positions: Tensor, length: int, window: int | None) -> Tensor:
    """[T, length]: which key positions each row sees."""
    at = torch.arange(length, device=positions.device)
    seen = at <= positions[:, None]
    return seen if window is None else seen & (at > positions[:, None] - window)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, rule: reference.ScoreRule
) -> Tensor:
    """[B, R, H, D] of q [B, R, H, D], keys and values [B, L, KH, D], seen [B, R, L]."""
    heads = q.shape[2] // keys.shape[2]
    q, keys, values = (t.transpose(1, 2) for t in (q, keys, values))
    seen = seen[:, None]
    if rule.softcap is None and rule.sinks is None:
        out = functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=seen, scale=rule.scale, enable_gqa=heads > 1
        )
        return out.transpose(1, 2)
    keys, values = (t.repeat_interleave(heads, 1) for t in (keys, values))
    scores = torch.matmul(q, keys.transpose(2, 3)).float() * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = torch.where(seen, scores, -torch.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    p = torch.softmax(scores, dim=-1)[..., : keys.shape[2]].to(q.dtype)
    return torch.matmul(p, values).transpose(1, 2)


class RmsNorm(ReferenceOp):
    """torch's own, which is one kernel."""

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Gives y, or (y, x + residual)."""
        total = x if residual is None else x + residual
        wide = functional.rms_norm(total.float(), (total.shape[-1],), weight.float(), eps)
        y = wide.to(x.dtype)
        return y if residual is None else (y, total)


class Linear(ReferenceOp):
    """cuBLAS or hipBLASLt in the model's dtype, or in FP8 with a scale per row of x and weight.

    fp8: encoding of the device's FP8, or None: the model's dtype.
    """

    def __init__(self, fp8: str | None) -> None:
        self._fp8 = None if fp8 is None else FP8[fp8]

    def pack(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """As given, or {"fp8" [in, out], "scale" [1, out], "bias"?}.

        A weight that is FP8 already comes with its "scale" [out] or [out, 1] and is brought to the
        device's encoding.
        """
        weight = weights["weight"]
        rest = {name: t for name, t in weights.items() if name == "bias"}
        if weight.dtype == torch.float8_e4m3fn:
            scale = weights["scale"].float().view(1, -1)
            if self._fp8 == torch.float8_e4m3fnuz:
                weight, scale = to_fnuz(weight, scale)
            return {"fp8": weight.t(), "scale": scale, **rest}
        odd = weight.shape[0] % FP8_STEP or weight.shape[1] % FP8_STEP
        if self._fp8 is None or odd or weight.shape[0] < FP8_LEAST_ROWS:
            return dict(weights)
        small, scale = _quantized(weight, self._fp8)
        return {"fp8": small.t(), "scale": scale.t().contiguous(), **rest}

    def __call__(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """[T, out]."""
        if "fp8" not in weights:
            return functional.linear(x, weights["weight"], weights.get("bias"))
        wide = x if x.dtype == torch.bfloat16 else x.to(torch.bfloat16)
        small, scale = _quantized(wide, weights["fp8"].dtype)
        y = torch._scaled_mm(  # row-wise scales give bfloat16 only
            small, weights["fp8"], scale_a=scale, scale_b=weights["scale"], out_dtype=torch.bfloat16
        ).to(x.dtype)
        return y if "bias" not in weights else y + weights["bias"]


def _quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """FP8 of x [rows, n], and the scale [rows, 1] float32 that brings a row's largest to the end of
    the range.
    """
    most = torch.finfo(dtype).max
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / most
    return (x.float() / scale).clamp(-most, most).to(dtype), scale


def to_fnuz(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3fn as e4m3fnuz: the same bits mean half as much there (its exponent's bias is 8, not 7),
    so the scale doubles, and the bits of -0 mean NaN, so they become 0.

    Source: ROCm's documentation of FP8 formats; the same is done by the engines that serve gfx94x.
    """
    bits = weight.view(torch.uint8)
    bits = torch.where(bits == 0x80, torch.zeros_like(bits), bits)
    return bits.view(torch.float8_e4m3fnuz), scale * 2


class Moe(ReferenceOp):
    """All experts compute every row, in the model's dtype; the gate is 0 where not chosen."""

    def __call__(
        self,
        x: Tensor,
        router_logits: Tensor,
        weights: Mapping[str, Tensor],
        *,
        top_k: int,
        renormalize: bool,
        kind: str,
    ) -> Tensor:
        """[T, E]."""
        gates = route(router_logits, top_k, renormalize)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(router_logits.shape[1]):
            gate, up = functional.linear(x, weights["w13"][expert]).float().chunk(2, dim=-1)
            hidden = (activation(gate, kind) * up).to(x.dtype)
            y = functional.linear(hidden, weights["w2"][expert]).float()
            chosen = gates[:, expert, None]
            out = out + torch.where(chosen > 0, chosen * y, 0.0)
        return out.to(x.dtype)


def torch_ops(fp8: str, *, fp8_linear: bool) -> Mapping[str, Op]:
    """All seven."""
    return {
        "attention": Attention(),
        "linear": Linear(fp8 if fp8_linear else None),
        "rms_norm": RmsNorm(),
        "rope": Rope(),
        "act_mul": ActMul(),
        "moe": Moe(),
        "sample": Sample(),
    }
