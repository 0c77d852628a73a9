"""Kernels for a compiler of static graphs: matrix products, gathers and masks in plain torch, no
sort, no value-dependent shape, the KV written without a view.

In: tensors of a bucket's fixed shapes. Out: the same as the reference ops. Weights keep the model's
dtype and products run in it; norms, softmax and the sampler compute in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tokenry.backend.base import Op, SampleInputs, StepBatch
from tokenry.backend.contract import NULL_BLOCK, HostBatch
from tokenry.backend.reference import ActMul, ReferenceOp, RmsNorm, Rope, activation

if TYPE_CHECKING:
    from tokenry_neuron.programs import ProgramMaker

NOWHERE = -1
"""Block and slot that the vendor's DMA skips (its design notes on padding of block KV)."""
MASKED = -1e30
"""Score of an unseen key: finite, so that a row that sees nothing gives zeros and no NaN."""
ONE_BITS = 0x3F800000
"""float32 1.0; as integers, floats from 0 to 1 keep their order."""


class KVLayer(NamedTuple):
    """Keys and values of a layer, [num_blocks * block_size, KH, D] each: written by index into the
    tensor itself, for a write through a view costs the in-place update (measured on XLA).
    """

    k: Tensor
    v: Tensor
    block_size: int


def signed_inputs(host: HostBatch, block_size: int) -> dict[str, NDArray[np.int32]]:
    """Block table and slots in which the null block is NOWHERE."""
    table = np.where(host.block_table == NULL_BLOCK, NOWHERE, host.block_table)
    slots = np.where(host.slots < (NULL_BLOCK + 1) * block_size, NOWHERE, host.slots)
    return {"signed_table": table.astype(np.int32), "signed_slots": slots.astype(np.int32)}


def neuron_ops(maker: ProgramMaker) -> Mapping[str, Op]:
    """By name; the reference's where it is element-wise, which the compiler fuses."""
    return {
        "attention": PagedAttention(),
        "linear": Linear(),
        "rms_norm": RmsNorm(),
        "rope": Rope(),
        "act_mul": ActMul(),
        "moe": DenseMoe(),
        "sample": Sample(maker),
    }


class PagedAttention(ReferenceOp):
    """Attention of right-padded rows [S, Q] over gathered blocks: two batched products."""

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
        """[T, num_heads * head_dim]; k and v are written to the slots of the batch."""
        S, Q = batch.bucket.seqs, batch.bucket.tokens // batch.bucket.seqs
        H, D = q.shape[1:]
        KH = k.shape[1]
        slots = batch.extra.get("signed_slots", batch.slots).clamp_min(0).long()
        kv_layer.k.index_copy_(0, slots, k.to(kv_layer.k.dtype))
        kv_layer.v.index_copy_(0, slots, v.to(kv_layer.v.dtype))
        table = batch.extra.get("signed_table", batch.block_table)
        seen = _seen(batch, table, kv_layer.block_size, window)  # [S, Q, L]
        keys, values = (_gather(x, table, kv_layer.block_size) for x in (kv_layer.k, kv_layer.v))
        used = torch.arange(keys.shape[1], device=q.device) < batch.seq_lens[:, None]
        values = torch.where(used[:, :, None, None], values, 0.0)  # 0 * NaN is NaN
        grouped = (q.float() * scale).view(S, Q, KH, H // KH, D).permute(0, 2, 1, 3, 4)
        scores = grouped.reshape(S, KH, -1, D) @ keys.permute(0, 2, 3, 1)  # [S, KH, Q * G, L]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.view(S, KH, Q, H // KH, -1)
        p = torch.softmax(torch.where(seen[:, None, :, None], scores, MASKED), dim=-1)
        out = p.view(S, KH, Q * (H // KH), -1) @ values.permute(0, 2, 1, 3)
        out = out.view(S, KH, Q, H // KH, D).permute(0, 2, 1, 3, 4)
        live = torch.arange(Q, device=q.device) < batch.q_lens[:, None]  # [S, Q]
        out = torch.where(live[:, :, None, None, None], out, 0.0)
        return out.reshape(S * Q, H * D).to(q.dtype)


def _gather(cache: Tensor, table: Tensor, block_size: int) -> Tensor:
    """[S, L, KH, D] in float32, L = block_size * blocks of the table."""
    blocks = cache.view(-1, block_size, *cache.shape[1:])
    return blocks[table.clamp_min(NULL_BLOCK).long()].flatten(1, 2).float()


def _seen(batch: StepBatch, table: Tensor, block_size: int, window: int | None) -> Tensor:
    """[S, Q, L]: the keys before each row's position, in blocks that are somewhere."""
    position = batch.positions.view(table.shape[0], -1, 1)
    at = torch.arange(table.shape[1] * block_size, device=table.device)
    held = (table != NOWHERE).repeat_interleave(block_size, dim=1)
    seen = (at <= position) & held[:, None]
    return seen if window is None else seen & (at > position - window)


class Linear(ReferenceOp):
    """x @ weight.T + bias in the weights' dtype, which the tensor engine sums in float32."""

    def __call__(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """[T, out]."""
        return functional.linear(x, weights["weight"], weights.get("bias"))


class DenseMoe(ReferenceOp):
    """Mixture of experts as batched products: every expert computes every row."""

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
        gates = _route(router_logits, top_k, renormalize)
        gate, up = (x @ weights["w13"].transpose(1, 2)).float().chunk(2, dim=-1)  # [N, T, I]
        hidden = (activation(gate, kind) * up).to(x.dtype)
        y = (hidden @ weights["w2"].transpose(1, 2)).float()  # [N, T, E]
        return (y * gates.T[:, :, None]).sum(0).to(x.dtype)


def _route(router_logits: Tensor, top_k: int, renormalize: bool) -> Tensor:
    """Gates [T, N]; the best expert is taken top_k times, of equals the lower."""
    p = torch.softmax(router_logits.float(), dim=-1)
    experts = torch.arange(p.shape[1], device=p.device)
    left, gates = p, torch.zeros_like(p)
    for _ in range(top_k):
        best = experts == left.argmax(-1, keepdim=True)
        gates = torch.where(best, p, gates)
        left = torch.where(best, -1.0, left)
    return gates / gates.sum(-1, keepdim=True) if renormalize else gates


class Sample(ReferenceOp):
    """The sampler as programs of its own, one per number of rows and kind of batch: logits and
    drawn tokens stay on the device, for any top_k.
    """

    def __init__(self, maker: ProgramMaker) -> None:
        self._maker = maker

    def __call__(self, logits: Tensor, inputs: SampleInputs) -> Tensor:
        """[R] int32, see `reference.Sample`."""
        if inputs.all_greedy:
            return self._maker.sampler(greedy, logits)
        given = (logits, inputs.temperature, inputs.uniform)
        if not inputs.any_filter:
            return self._maker.sampler(draw, *given)
        filters = (inputs.top_k, inputs.top_p, inputs.min_p)
        return self._maker.sampler(draw_filtered, *given, *filters)


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, of equals the lowest."""
    return logits.argmax(-1).to(torch.int32)


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """One token per row by the inverse of the distribution at `uniform`; greedy where cold."""
    return _inverse(logits, _softened(logits, temperature), temperature, uniform)


def draw_filtered(
    logits: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """As `draw`, among the tokens that the filters leave."""
    p = _softened(logits, temperature)
    vocab = p.shape[1]
    wanted = torch.where(top_k > 0, top_k, vocab).clamp_max(vocab)
    keep = _leading(p, torch.ones_like(p), wanted.float())
    mass = torch.where(keep, p, 0.0)
    nucleus = _leading(p, mass, top_p * mass.sum(-1))
    keep = keep & (nucleus | (top_p >= 1)[:, None])
    keep = keep & (p >= min_p[:, None] * p.amax(-1, keepdim=True))
    best = torch.arange(vocab, device=p.device) == p.argmax(-1, keepdim=True)
    return _inverse(logits, torch.where(keep | best, p, 0.0), temperature, uniform)


def _softened(logits: Tensor, temperature: Tensor) -> Tensor:
    safe = torch.where(temperature == 0, 1.0, temperature)
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / safe[:, None], dim=-1)


def _inverse(logits: Tensor, p: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    mass = p.cumsum(-1)
    drawn = (mass <= (uniform * mass[:, -1])[:, None]).sum(-1)
    ids = torch.arange(p.shape[1], device=p.device)
    last = torch.where(p > 0, ids, 0).amax(-1)  # where rounding puts the target past the end
    return torch.where(temperature == 0, logits.argmax(-1), drawn.minimum(last)).to(torch.int32)


def _leading(p: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """[R, V]: the tokens from the most likely on whose weights reach `target` [R].

    Without a sort: the probability at which that happens is found by bisection over the bits of
    float32, which is exact; of tokens that have just this probability the lower ids go first.
    """
    bits = p.view(torch.int32)
    low = torch.zeros_like(bits[:, 0])
    high = torch.full_like(low, ONE_BITS + 1)
    for _ in range((ONE_BITS + 1).bit_length()):
        middle = low + (high - low) // 2
        reached = torch.where(bits >= middle[:, None], weight, 0.0).sum(-1) >= target
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    above, equal = bits > low[:, None], bits == low[:, None]
    before = torch.where(above, weight, 0.0).sum(-1, keepdim=True)
    tied = torch.where(equal, weight, 0.0)
    before_tied = before + tied.cumsum(-1) - tied
    return above | (equal & (before_tied < target[:, None]))
