"""Kernels of the HPU: attention over flat block lists, and the vendor's fused kernels.

In: tensors on the device, shapes as in `base.Op`; the KV of a layer is `KVLayer`. Out: the same as
the reference ops within the dtype's tolerance. Nothing here reads a value from the device, and
every shape follows from the bucket, so a step is one static graph. A row that is NaN stays alone:
no sum over blocks mixes requests before what is not finite has been taken out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tokenry.backend import reference
from tokenry.backend.base import Op, SampleInputs, StepBatch
from tokenry.backend.contract import HostBatch
from tokenry.backend.reference import ReferenceOp, ScoreRule, activation
from tokenry.errors import UncoveredShape
from tokenry_hpu.vendor import Vendor, experts, fp8_gemm, to_fp8

LOW = -1e30
"""A score that loses every maximum; -inf would make NaN of a block that no row sees."""
FLAT = ("block_list", "block_groups", "block_usage", "block_bases")
"""Names of `flat_blocks`."""
FP8_LEAST_ROWS = 256
"""Weights with fewer output rows (routers of experts) stay in the model's dtype."""


class KVLayer(NamedTuple):
    """Keys and values of a layer, each [num_blocks * block_size, num_kv_heads, head_dim]: rows are
    slots, so that a write is one `index_copy_` on the tensor itself (a write through a view costs
    a copy of the cache).
    """

    k: Tensor
    v: Tensor
    block_size: int


def flat_blocks(host: HostBatch, block_size: int) -> Mapping[str, NDArray[np.int32]]:
    """The blocks of all requests in one list of bucket.kv_blocks entries, request by request.

    block_list   block id, padding 0           block_groups  row of the request, padding -1
    block_usage  tokens in the block, padding 0  block_bases   position of its first token
    Raises UncoveredShape if the batch holds more blocks. (A blank batch of warm-up may claim more:
    its blocks are all the null block.)
    """
    n = host.bucket.kv_blocks
    lens = host.seq_lens
    counts = -(-lens // block_size)
    if counts.sum() > n and host.block_table.any():
        raise UncoveredShape(f"The batch holds {counts.sum()} blocks, {host.bucket} has {n}.")
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)[:n]
    starts = np.repeat(np.cumsum(counts) - counts, counts)[:n]
    column = np.arange(len(rows)) - starts
    lists = np.zeros((4, n), np.int32)
    lists[1].fill(-1)
    held = host.block_table[rows, np.minimum(column, host.block_table.shape[1] - 1)]
    bases = column * block_size
    used = np.minimum(lens[rows] - bases, block_size)
    for into, values in zip(lists, (held, rows, used, bases), strict=True):
        into[: len(rows)] = values
    return dict(zip(FLAT, lists, strict=True))


class Attention(ReferenceOp):
    """Writes the KV, then decode over the flat list, or prefill by FusedSDPA."""

    def __init__(self, vendor: Vendor) -> None:
        self._sdpa = vendor.sdpa

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_layer: KVLayer,
        batch: StepBatch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """[T, num_heads * head_dim]."""
        slots = batch.slots.long()
        kv_layer.k.index_copy_(0, slots, k.to(kv_layer.k.dtype))
        kv_layer.v.index_copy_(0, slots, v.to(kv_layer.v.dtype))
        rule = ScoreRule(scale=scale, window=window, softcap=softcap)
        if batch.bucket.phase == "decode":
            return flat_decode(q, kv_layer, batch, rule).flatten(1)
        keys, values, mask = _context(q, kv_layer, batch, rule)
        if softcap is not None:
            return _capped(q, keys, values, mask, rule).flatten(1)
        mode = "fast" if q.dtype == torch.bfloat16 else "None"
        out: Tensor = self._sdpa.apply(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            mask,
            0.0,
            False,
            scale,
            mode,
            True,
        )
        return out[0].transpose(0, 1).flatten(1)


def _gather(cache: Tensor, batch: StepBatch, block_size: int) -> Tensor:
    """[kv_blocks, block_size, KH, D] of the listed blocks; a view that is only read is free."""
    blocks = cache.view(-1, block_size, *cache.shape[1:])
    return blocks.index_select(0, batch.extra["block_list"])


def _context(
    q: Tensor, kv_layer: KVLayer, batch: StepBatch, rule: ScoreRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [L, KH, D] of the one request of a prefill (what was cached and what has just
    been written), 0 past its end, and the additive mask [1, 1, T, L].
    """
    keys = _gather(kv_layer.k, batch, kv_layer.block_size).flatten(0, 1)
    values = _gather(kv_layer.v, batch, kv_layer.block_size).flatten(0, 1)
    at = torch.arange(keys.shape[0], device=q.device)
    live = (at < batch.seq_lens)[:, None, None]  # what a block held before may be NaN
    keys, values = torch.where(live, keys, 0.0), torch.where(live, values, 0.0)
    positions = batch.positions[:, None]
    seen = at <= positions
    if rule.window is not None:
        seen = seen & (at > positions - rule.window)
    mask = torch.where(seen, 0.0, -torch.inf).to(q.dtype)[None, None]
    return keys.to(q.dtype), values.to(q.dtype), mask


def _capped(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, rule: ScoreRule) -> Tensor:
    """[T, H, D]: prefill with softcap, which the fused kernel does not have. Holds all scores."""
    T, H, D = q.shape
    KH = keys.shape[1]
    grouped = q.view(T, KH, H // KH, D).permute(1, 2, 0, 3)  # [KH, G, T, D]
    scores = torch.matmul(grouped, keys.permute(1, 2, 0)[:, None]).float() * rule.scale
    p = torch.softmax(_cap(scores, rule) + mask[0].float(), dim=-1).to(q.dtype)
    out = torch.matmul(p, values.transpose(0, 1)[:, None])
    return out.permute(2, 0, 1, 3).reshape(T, H, D)


def _cap(scores: Tensor, rule: ScoreRule) -> Tensor:
    if rule.softcap is None:
        return scores
    return rule.softcap * torch.tanh(scores / rule.softcap)


def flat_decode(q: Tensor, kv_layer: KVLayer, batch: StepBatch, rule: ScoreRule) -> Tensor:
    """[S, H, D]: one row per request over the flat list of blocks; a row without blocks gives 0.

    First pass: softmax within each block. Second pass: the blocks of a request are brought to their
    common maximum and summed, by a product with the one-hot map of blocks to rows (the matrix
    engine's work). Scheme: vllm-gaudi extension/ops.py, flat_pa; written anew.
    """
    S, H, D = q.shape
    groups, usage = batch.extra["block_groups"], batch.extra["block_usage"]
    rows = groups.clamp_min(0)
    keys = _gather(kv_layer.k, batch, kv_layer.block_size).to(q.dtype)
    values = _gather(kv_layer.v, batch, kv_layer.block_size).to(q.dtype)
    KH = keys.shape[2]
    at = torch.arange(kv_layer.block_size, device=q.device)
    seen = at < usage[:, None]  # [N, bs]
    values = torch.where(seen[:, :, None, None], values, 0.0)
    if rule.window is not None:
        position = batch.positions.index_select(0, rows)
        first = batch.extra["block_bases"][:, None] + at
        seen = seen & (first > position[:, None] - rule.window)
    seen = seen[:, None, None, :]
    spread = (q * rule.scale).index_select(0, rows).view(-1, KH, H // KH, D)
    scores = torch.matmul(spread, keys.permute(0, 2, 3, 1)).float()  # [N, KH, G, bs]
    scores = torch.where(seen, _cap(scores, rule), LOW)
    peak = scores.amax(-1)
    p = torch.where(seen, torch.exp(scores - peak[..., None]), 0.0)
    part = torch.matmul(p.to(q.dtype), values.transpose(1, 2)).view(-1, H, D)
    owns = groups[:, None] == torch.arange(S, device=q.device)  # [N, S]
    return _join(part, peak.flatten(1), p.sum(-1).flatten(1), rows, owns)


def _join(part: Tensor, peak: Tensor, mass: Tensor, rows: Tensor, owns: Tensor) -> Tensor:
    """[S, H, D] from the blocks' weighted values [N, H, D], maxima and sums [N, H]."""
    S, H = owns.shape[1], peak.shape[1]
    lowest = torch.full((S, H), LOW, device=peak.device)
    top = lowest.index_reduce(0, rows, peak, "amax").index_select(0, rows)
    weight = torch.exp(peak - top)
    total = torch.zeros_like(lowest).index_add(0, rows, mass * weight)
    share = weight / total.index_select(0, rows).clamp_min(1e-30)
    scaled = part * share.to(part.dtype)[..., None]
    whole = torch.isfinite(scaled).all(-1, keepdim=True)  # [N, H, 1]
    to_rows = owns.t().to(part.dtype)
    out = torch.matmul(to_rows, torch.where(whole, scaled, 0.0).flatten(1)).view(S, H, -1)
    broken = torch.matmul(to_rows, (~whole[..., 0]).to(part.dtype)) > 0
    return torch.where(broken[..., None], torch.nan, out)


class RmsNorm(ReferenceOp):
    """FusedRMSNorm; it wants x and weight of one dtype, and x with a batch axis."""

    def __init__(self, vendor: Vendor) -> None:
        self._norm = vendor.rms_norm

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Gives y, or (y, x + residual)."""
        total = x if residual is None else x + residual
        wide = total.to(weight.dtype)[None]
        y: Tensor = self._norm.apply(wide, weight, eps)[0].to(x.dtype)
        return y if residual is None else (y, total)


class Rope(ReferenceOp):
    """The vendor's rotary embedding in float32, on the first `rot` dims."""

    def __init__(self, vendor: Vendor) -> None:
        self._rotary, self._mode = vendor.rotary, vendor.blockwise

    def __call__(
        self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotated copies of q [T, H, D] and k [T, KH, D]; table [max_len, 2, rot/2]."""
        cos, sin = table.index_select(0, positions).float()[:, :, None, :].unbind(1)
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)  # [T, 1, rot]
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rot = cos.shape[-1]
        y: Tensor = self._rotary(x[..., :rot].float(), cos, sin, None, 0, self._mode).to(x.dtype)
        return y if rot == x.shape[-1] else torch.cat((y, x[..., rot:]), dim=-1)


class Linear(ReferenceOp):
    """In the model's dtype, or in FP8 with one scale per row of x and of the weight.

    fp8_max: largest value of the device's float8_e4m3 (Gaudi 2: 240, Gaudi 3: 448); None: no FP8.
    """

    def __init__(self, fp8_max: float | None) -> None:
        self._fp8_max = fp8_max

    def pack(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """As given, or {"fp8", "scale", "bias"?}."""
        weight = weights["weight"]
        if self._fp8_max is None or weight.shape[0] < FP8_LEAST_ROWS:
            return dict(weights)
        scale = _scale(weight, self._fp8_max)
        packed = {"fp8": to_fp8(weight, scale.to(weight.dtype)), "scale": scale[:, 0]}
        return packed | {name: t for name, t in weights.items() if name == "bias"}

    def __call__(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """[T, out]."""
        if "fp8" not in weights or self._fp8_max is None:
            return functional.linear(x, weights["weight"], weights.get("bias"))
        scale = _scale(x, self._fp8_max)
        return fp8_gemm(to_fp8(x, scale.to(x.dtype)), scale, weights, x.dtype)


def _scale(x: Tensor, fp8_max: float) -> Tensor:
    """[rows, 1] float32, rounded to x's dtype: what brings the largest of a row to fp8_max."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-8) / fp8_max
    return scale.to(x.dtype).float()


class ActMul(ReferenceOp):
    """The gate of a gated MLP, in the model's dtype; the graph compiler fuses it."""

    def __call__(self, x: Tensor, kind: str) -> Tensor:
        """[T, I] = kind(x[:, :I]) * x[:, I:]."""
        gate, up = x.chunk(2, dim=-1)
        return activation(gate, kind) * up


class Moe(ReferenceOp):
    """The vendor's mixture of experts."""

    def supports(self, **meta: Any) -> bool:
        """Silu is the activation whose formula the vendor's kernel surely shares."""
        return meta.get("kind") == "silu"

    def pack(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """One tensor per expert; views, nothing is copied."""
        return {"w12": list(weights["w13"].unbind(0)), "w3": list(weights["w2"].unbind(0))}

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
        """[T, E]."""
        gates, ids = torch.softmax(router_logits.float(), dim=-1).topk(top_k, dim=-1)
        if renormalize:
            gates = gates / gates.sum(-1, keepdim=True)
        return experts(x, ids, gates.to(x.dtype), weights, kind)


class Sample(reference.Sample):
    """The reference; what it launches is a recipe of its own, the same after every program."""

    def __init__(self, vendor: Vendor) -> None:
        self._vendor = vendor

    def __call__(self, logits: Tensor, inputs: SampleInputs) -> Tensor:
        """[R] int32."""
        drawn = super().__call__(logits, inputs)
        self._vendor.mark()
        return drawn


def hpu_ops(vendor: Vendor, fp8_max: float | None) -> Mapping[str, Op]:
    """All seven."""
    return {
        "attention": Attention(vendor),
        "linear": Linear(fp8_max),
        "rms_norm": RmsNorm(vendor),
        "rope": Rope(vendor),
        "act_mul": ActMul(),
        "moe": Moe(),
        "sample": Sample(vendor),
    }
