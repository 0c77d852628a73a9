"""The attention op: writes the new keys and values, then attends, without waiting for the device.

In: q, k, v, one layer's KV [2, num_blocks, block_size, num_kv_heads, head_dim] and the batch. Out:
[T, num_heads * head_dim]. The grid follows from the bucket and the width of the block table alone,
so a captured step replays on any batch of its bucket. The KV may be float8 where the
architecture has it: it is widened when read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from tokenry.backend.base import StepBatch
from tokenry.backend.reference import ReferenceOp
from tokenry_triton.kernels import attention as kernels
from tokenry_triton.launch import Arch, Tile
from tokenry_triton.rows import fits_dtype
from tokenry_triton.tune import Tuner

MAX_HEAD_DIM = 256
MAX_GROUP = 64
"""Most query heads of one KV head."""
MAX_SPLITS = 32
"""Programs that one request's decode is spread over at most: bounds the memory of the parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a layer does to its scores. sinks [num_heads]; kv_scales [2, num_kv_heads] float32."""

    scale: float
    window: int
    softcap: float
    sinks: Tensor | None = None
    kv_scales: Tensor | None = None


class Attention(ReferenceOp):
    """Paged attention for prefill, chunks and decode.

    deterministic: one tile for all phases and no splits, so that the bits of a row depend neither
    on the other rows nor on chunking; long decodes of few requests are slower for it.
    """

    def __init__(
        self, arch: Arch, *, deterministic: bool = False, tuner: Tuner | None = None
    ) -> None:
        self._arch = arch
        self._deterministic = deterministic
        self._tuner = tuner

    def supports(self, **meta: Any) -> bool:
        """Head dims up to 256, up to 64 query heads for one KV head."""
        group = int(meta.get("num_heads", 1)) // max(1, int(meta.get("num_kv_heads", 1)))
        return (
            fits_dtype(meta) and int(meta.get("head_dim", 1)) <= MAX_HEAD_DIM and group <= MAX_GROUP
        )

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
        kv_scales: Tensor | None = None,
    ) -> Tensor:
        """[T, num_heads * head_dim], 0 where a row is padding.

        sinks      [num_heads]: a score of each head that takes its share of the softmax and gives
                   nothing.
        kv_scales  [2, num_kv_heads] float32: keys and values are kept divided by them (float8 KV).
        """
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        write_kv(k, v, kv_layer, batch.slots, kv_scales)
        rule = Rule(
            scale=scale, window=window or 0, softcap=softcap or 0.0, sinks=sinks,
            kv_scales=kv_scales,
        )  # fmt: skip
        bucket = batch.bucket
        decode = bucket.phase == "decode" and bucket.tokens == bucket.seqs
        splits = 1
        if decode and not self._deterministic:
            width = batch.block_table.shape[1] * kv_layer.shape[2]
            splits = min(MAX_SPLITS, triton.cdiv(width, self._arch.split))
        if splits > 1:
            return self._split(q, kv_layer, batch, rule, splits)
        # a decode's row i is request i's and is written; what other steps leave out is padding
        make = torch.empty if decode else torch.zeros
        out = make((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        self._attend(q, kv_layer, batch, rule, out=out, decode=decode)
        return out

    def _split(
        self, q: Tensor, kv_layer: Tensor, batch: StepBatch, rule: Rule, splits: int
    ) -> Tensor:
        """A decode whose requests are spread over programs and merged from first key to last."""
        tokens, heads, dim = q.shape
        shape = (tokens, heads, splits)
        parts = torch.empty((*shape, dim), dtype=torch.float32, device=q.device)
        peaks = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
        sums = torch.empty_like(peaks)
        out = torch.empty((tokens, heads * dim), dtype=q.dtype, device=q.device)
        self._attend(q, kv_layer, batch, rule, out=out, decode=True, parts=(parts, peaks, sums))
        kernels.merge[(tokens, heads)](
            parts, peaks, sums, out, batch.seq_lens, out if rule.sinks is None else rule.sinks,
            splits, dim, DIM=triton.next_power_of_2(dim), SPLIT=self._arch.split, MOST=MAX_SPLITS,
            SINKS=rule.sinks is not None, num_warps=1,
        )  # fmt: skip
        return out

    def _attend(
        self,
        q: Tensor,
        kv_layer: Tensor,
        batch: StepBatch,
        rule: Rule,
        *,
        out: Tensor,
        decode: bool,
        parts: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        """Launch the kernel over tiles of requests, KV heads and splits."""
        tokens, heads, dim = q.shape
        kv_heads, seqs = kv_layer.shape[3], batch.bucket.seqs
        group = heads // kv_heads
        padded = triton.next_power_of_2(group)
        tile = self._arch.attention(head_dim=dim, decode=decode or self._deterministic)
        plane, block, slot, head, _ = kv_layer.stride()
        splits = 1 if parts is None else parts[1].shape[2]

        def launch(tile: Tile) -> None:
            m = max(tile.m, padded)
            per_tile = 1 if decode else m // padded
            tiles = seqs if decode else triton.cdiv(tokens, per_tile) + seqs
            kernels.attend[(tiles, kv_heads, splits)](
                q, kv_layer, out, *(parts or (out, out, out)),
                batch.q_start, batch.q_lens, batch.seq_lens, batch.block_table,
                out if rule.sinks is None else rule.sinks,
                out if rule.kv_scales is None else rule.kv_scales,
                q.stride(0), q.stride(1), plane, block, slot, head, batch.block_table.stride(0),
                seqs, seqs.bit_length(), heads, group, dim, rule.scale, rule.softcap, rule.window,
                BLOCK_SIZE=kv_layer.shape[2], M=m, N=tile.n, TOKENS=per_tile, GROUP=padded,
                DIM=max(16, triton.next_power_of_2(dim)), DECODE=decode, SOFTCAP=rule.softcap > 0,
                WINDOW=rule.window > 0, SPLIT=0 if parts is None else self._arch.split,
                MOST=MAX_SPLITS, SINKS=rule.sinks is not None, SCALED=rule.kv_scales is not None,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip

        if self._tuner is not None:
            # one tile for all widths of a table: a split's keys are a multiple of any tile's
            shape = f"{dim} of {group} {q.dtype} {kv_layer.dtype} block {kv_layer.shape[2]}"
            kind = "decode" if decode else "prefill"
            tile = self._tuner.pick(kind, shape, tile, launch, axes="nws" if decode else "nmws")
        launch(tile)


def write_kv(
    k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor, scales: Tensor | None = None
) -> None:
    """k, v [T, KH, D] to their slots of kv_layer, in place, divided by scales [2, KH] if there are
    some; slots of block 0 are left alone. Float8 saturates.
    """
    tokens, heads, dim = k.shape
    plane, block, slot, head, _ = kv_layer.stride()
    most = torch.finfo(kv_layer.dtype).max if kv_layer.element_size() == 1 else 0.0
    if tokens:
        kernels.write_kv[(tokens,)](
            k, v, kv_layer, slots, k if scales is None else scales,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            plane, block, slot, head, heads, dim, BLOCK_SIZE=kv_layer.shape[2],
            HEADS=triton.next_power_of_2(heads), DIM=triton.next_power_of_2(dim),
            SCALED=scales is not None, MOST=most, num_warps=4,
        )  # fmt: skip
