"""The seven ops in plain torch, in float32: the oracle of every kernel, and what runs where a
device has none.

In: tensors on any device that torch knows, shapes as in `base.Op`. Out: the same, in the dtype of
the input.
Right first, fast second. No op waits for the device: shapes come from `batch.bucket` and the
tensors' own shapes, everything else is masked, so these ops also run on devices that refuse to show
a value in a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenry.backend.base import Op, SampleInputs, StepBatch

SLICE_ELEMENTS = 16 * 2**20
"""Bound on the gathered keys of one slice of tokens (64 MiB in float32)."""
MAX_LOOPED_SEQS = 8
"""Up to so many requests attention goes request by request; more are cheaper token by token."""


class ReferenceOp:
    """An op that does everything and keeps weights as they are."""

    def supports(self, **meta: Any) -> bool:
        """Yes."""
        return True

    def pack(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """The weights as given."""
        return dict(weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRule:
    """What a layer does to its scores, see `base.Op`."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None = None


class Attention(ReferenceOp):
    """Causal attention over paged KV, see `base.Op`."""

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
        """[T, num_heads * head_dim]; kv_layer [2, num_blocks, block_size, num_kv_heads, head_dim]
        gets k and v.
        """
        write_kv(k, v, kv_layer, batch.slots)
        T, S = batch.bucket.tokens, batch.bucket.seqs
        rows = torch.arange(T, device=q.device)
        owner = torch.searchsorted(batch.q_start, rows.to(batch.q_start.dtype), right=True) - 1
        owner = owner.clamp(0, S - 1)
        live = rows - batch.q_start[owner] < batch.q_lens[owner]
        KH = k.shape[1]
        grouped = q.float().view(T, KH, q.shape[1] // KH, q.shape[2])
        rule = ScoreRule(scale=scale, window=window, softcap=softcap, sinks=sinks)
        if S <= MAX_LOOPED_SEQS:
            out = _by_request(grouped, kv_layer, batch, owner, rule)
        else:
            out = _by_token(grouped, kv_layer, batch, owner, rule)
        out = torch.where(live[:, None], out.reshape(T, -1), 0.0)
        return out.to(q.dtype)


def write_kv(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor) -> None:
    """k, v [T, KH, D] to their slots, in place; padding rows all go to block 0."""
    index = (slots.long(),)
    kv_layer[0].flatten(0, 1).index_put_(index, k.to(kv_layer.dtype))
    kv_layer[1].flatten(0, 1).index_put_(index, v.to(kv_layer.dtype))


def _by_request(
    q: Tensor, kv_layer: Tensor, batch: StepBatch, owner: Tensor, rule: ScoreRule
) -> Tensor:
    """Each request's keys against all rows, kept where the row is its own."""
    out = torch.zeros_like(q)
    for i in range(batch.bucket.seqs):
        keys, values = _gather(kv_layer, batch.block_table[i : i + 1], batch.seq_lens[i : i + 1])
        seen = _visible(batch.positions, keys.shape[1], rule.window)
        scores = torch.einsum("tkgd,lkd->tkgl", q, keys[0])
        p = _softmax(scores, seen, rule)
        mine = torch.einsum("tkgl,lkd->tkgd", p, values[0])
        out = torch.where((owner == i)[:, None, None, None], mine, out)
    return out


def _by_token(
    q: Tensor, kv_layer: Tensor, batch: StepBatch, owner: Tensor, rule: ScoreRule
) -> Tensor:
    """Each row with its own gathered keys, in slices of bounded memory."""
    length = batch.block_table.shape[1] * kv_layer.shape[2]
    step = max(1, SLICE_ELEMENTS // (length * kv_layer.shape[3] * kv_layer.shape[4]))
    parts = []
    for at in range(0, q.shape[0], step):
        own = owner[at : at + step]
        keys, values = _gather(kv_layer, batch.block_table[own], batch.seq_lens[own])
        seen = _visible(batch.positions[at : at + step], length, rule.window)
        scores = torch.einsum("tkgd,tlkd->tkgl", q[at : at + step], keys)
        p = _softmax(scores, seen, rule)
        parts.append(torch.einsum("tkgl,tlkd->tkgd", p, values))
    return torch.cat(parts)


def _gather(kv_layer: Tensor, table: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [S, MB * block_size, KH, D] in float32; values past seq_len are 0, for 0 *
    NaN is NaN.
    """
    index = table.long()
    keys = kv_layer[0][index].flatten(1, 2).float()
    values = kv_layer[1][index].flatten(1, 2).float()
    at = torch.arange(keys.shape[1], device=keys.device)
    live = at < seq_lens[:, None]
    return keys, torch.where(live[:, :, None, None], values, 0.0)


def _visible(positions: Tensor, length: int, window: int | None) -> Tensor:
    """[T, length]: which key positions each row sees."""
    at = torch.arange(length, device=positions.device)
    seen = at <= positions[:, None]
    if window is not None:
        seen = seen & (at > positions[:, None] - window)
    return seen


def _softmax(scores: Tensor, seen: Tensor, rule: ScoreRule) -> Tensor:
    scores = scores * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = torch.where(seen[:, None, None, :], scores, -torch.inf)
    if rule.sinks is None:
        return torch.softmax(scores, dim=-1)
    sinks = rule.sinks.float().view(1, *scores.shape[1:3], 1).expand(len(scores), -1, -1, -1)
    return torch.softmax(torch.cat((scores, sinks), dim=-1), dim=-1)[..., :-1]


class Linear(ReferenceOp):
    """x @ weight.T + bias."""

    def __call__(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """[T, out]."""
        bias = weights.get("bias")
        y = functional.linear(
            x.float(), weights["weight"].float(), None if bias is None else bias.float()
        )
        return y.to(x.dtype)


class RmsNorm(ReferenceOp):
    """Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467), optionally of x +
    residual.
    """

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or (y, x + residual)."""
        total = x if residual is None else x + residual
        wide = total.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        y = (wide * weight.float()).to(x.dtype)
        return y if residual is None else (y, total)


class Rope(ReferenceOp):
    """Rotary embedding of the first `rot` dims, half-split order (Su et al., arXiv 2104.09864)."""

    def __call__(
        self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rotated copies of q [T, H, D] and k [T, KH, D]; table [max_len, 2, rot/2] holds cos and
        sin.
        """
        cos, sin = table[positions.long()].float()[:, :, None, :].unbind(1)  # [T, 1, rot/2]
        return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    wide = x.float()
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


def activation(x: Tensor, kind: str) -> Tensor:
    """silu, gelu (exact) or gelu_tanh."""
    if kind == "silu":
        return functional.silu(x)
    if kind == "gelu":
        return functional.gelu(x)
    if kind == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    raise ValueError(f"unknown activation {kind!r}: silu, gelu, gelu_tanh")


class ActMul(ReferenceOp):
    """The gate of a gated MLP."""

    def __call__(self, x: Tensor, kind: str) -> Tensor:
        """[T, I] = kind(x[:, :I]) * x[:, I:]."""
        gate, up = x.float().chunk(2, dim=-1)
        return (activation(gate, kind) * up).to(x.dtype)


class Moe(ReferenceOp):
    """Mixture of experts: all experts compute every row, the gate is 0 where not chosen."""

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
        wide = x.float()
        out = torch.zeros_like(wide)
        for expert in range(router_logits.shape[1]):
            gate, up = functional.linear(wide, weights["w13"][expert].float()).chunk(2, dim=-1)
            y = functional.linear(activation(gate, kind) * up, weights["w2"][expert].float())
            out = out + gates[:, expert, None] * y
        return out.to(x.dtype)


def route(router_logits: Tensor, top_k: int, renormalize: bool) -> Tensor:
    """Gates [T, N] in float32: the top_k softmax weights of each row, 0 elsewhere; of equals the
    lower expert wins.
    """
    p = torch.softmax(router_logits.float(), dim=-1)
    order = torch.argsort(p, dim=-1, descending=True, stable=True)[:, :top_k]
    top = p.gather(1, order)
    if renormalize:
        top = top / top.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(1, order, top)


class Sample(ReferenceOp):
    """Draws one token per row; no row's result depends on another row."""

    def __call__(self, logits: Tensor, inputs: SampleInputs) -> Tensor:
        """[R] int32.

        Greedy (temperature 0) is the argmax, of equals the lowest id. Otherwise filters (top_k,
        then top_p of what it left, then min_p), then the inverse of the cumulative distribution in
        id order at `uniform`. Id order, because whether the batch had to be sorted (any_filter) may
        not change a row's draw.
        """
        greedy = logits.argmax(-1)
        if inputs.all_greedy:
            return greedy.to(torch.int32)
        zero = inputs.temperature == 0
        temperature = torch.where(zero, 1.0, inputs.temperature)
        shifted = logits - logits.amax(-1, keepdim=True)  # no overflow at tiny temperatures
        p = torch.softmax(shifted / temperature[:, None], dim=-1)
        if inputs.any_filter:
            p = torch.where(_kept(p, inputs), p, 0.0)
        mass = p.cumsum(-1)
        total = mass[:, -1]  # not p.sum(-1): a sum over one row alone may be split over threads
        below = torch.nextafter(total, torch.zeros_like(total))
        target = torch.minimum(inputs.uniform * total, below)
        drawn = (mass <= target[:, None]).sum(-1)
        return torch.where(zero, greedy, drawn).to(torch.int32)


def _kept(p: Tensor, inputs: SampleInputs) -> Tensor:
    """[R, V]: which tokens the row's filters leave."""
    ranked, order = torch.sort(p, dim=-1, descending=True, stable=True)
    rank = torch.arange(p.shape[1], device=p.device)
    k = inputs.top_k[:, None]
    keep = (rank < k) | (k <= 0)
    cumulative = torch.where(keep, ranked, 0.0).cumsum(-1)
    before = torch.cat((torch.zeros_like(cumulative[:, :1]), cumulative[:, :-1]), dim=-1)
    top_p = inputs.top_p[:, None]
    keep &= (before < top_p * cumulative[:, -1:]) | (top_p >= 1)
    keep &= ranked >= inputs.min_p[:, None] * ranked[:, :1]
    keep |= rank == 0
    return torch.zeros_like(keep).scatter(1, order, keep)


REFERENCE_OPS: Mapping[str, Op] = {
    "attention": Attention(),
    "linear": Linear(),
    "rms_norm": RmsNorm(),
    "rope": Rope(),
    "act_mul": ActMul(),
    "moe": Moe(),
    "sample": Sample(),
}
