"""Kernels in plain torch, for where the native ones could not be built. Their rows do not
depend on the batch: alone or among others, whole or in chunks, the same bits.

In: tensors in host memory. Out: the same as the reference ops, by three rules, each tested bit for
bit.
1. Matrix products run on packed weights (oneDNN), which sums each row alike for any number of rows
from 2 on; one row
   is computed as two. (The plain product of torch picks its blocking by the number of rows.)
2. Attention multiplies query tiles whose rows are a multiple of 4 with keys padded to a multiple of
CHUNK, and adds up
   the values chunk by chunk; what padding adds is exactly 0, so its length does not matter.
3. Everything else reduces along one row only.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import Op, StepBatch
from tokenry.backend.contract import HostBatch, KVSpec
from tokenry.backend.reference import ActMul, ReferenceOp, RmsNorm, Rope, Sample
from tokenry_cpu.moe import RowMoe

CHUNK = 128
"""Keys per partial sum of values, a multiple of every block size."""
ROWS = 4
"""Rows of a query tile come in multiples of this."""
TILE_TOKENS = 128
"""Tokens of a prompt that share one pass over the keys."""
GATHER_ELEMENTS = 2**20
"""Bound on the keys and values gathered at once, so that they stay in the cache between the two
products.
"""


ROW_COUNTS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def ops() -> Mapping[str, Op]:
    """The kernels by name; plain torch is the CPU's own where it already works row by row."""
    linear = PackedLinear()
    return {
        "attention": PagedAttention(),
        "linear": linear,
        "rms_norm": RmsNorm(),
        "rope": RowRope(),
        "act_mul": ActMul(),
        "moe": RowMoe(linear),
        "sample": Sample(),
    }


# ---- linear -----------------------------------------------------------------------


class PackedLinear(ReferenceOp):
    """x @ weight.T + bias on weights in oneDNN's own layout."""

    def pack(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """The weight reordered; where the CPU has no instructions for its dtype, as float32."""
        weight, bias = weights["weight"], weights.get("bias")
        dtype = weight.dtype if _has_products(weight.dtype) else torch.float32
        return {
            "packed": torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous()),
            "bias": None if bias is None else bias.to(dtype),
            "dtype": dtype,
        }

    def __call__(self, x: Tensor, weights: Mapping[str, Any]) -> Tensor:
        """[T, out]."""
        rows, dtype = x.shape[0], weights["dtype"]
        wide = x if x.dtype == dtype else x.to(dtype)
        padded = padded_rows(rows)
        if padded != rows:
            wide = torch.nn.functional.pad(wide, (0, 0, 0, padded - rows))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            wide.contiguous(), weights["packed"], weights["bias"], "none", [], ""
        )
        y = y[:rows]
        return y if y.dtype == x.dtype else y.to(x.dtype)


def padded_rows(rows: int) -> int:
    """The row count that is really computed: one of 13 up to 256, then multiples of 128.

    oneDNN makes and keeps a primitive of about 1 MiB per shape (measured: 1.1 GiB after all row
    counts to 250 on five small weights), so the shapes must be few. Never 1: that kernel's sums
    differ from the others'.
    """
    if rows > ROW_COUNTS[-1]:
        return -(-rows // 128) * 128
    return ROW_COUNTS[bisect.bisect_left(ROW_COUNTS, rows)]


def _has_products(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


# ---- rope -------------------------------------------------------------------------


class RowRope(ReferenceOp):
    """Rotary embedding of queries and keys in one go."""

    def __init__(self) -> None:
        self._reference = Rope()

    def __call__(
        self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `base.Op`."""
        half = table.shape[2]
        if q.dtype != torch.float32 or 2 * half != q.shape[2]:
            return self._reference(q, k, positions, table)
        cos, sin = table.index_select(0, positions)[:, :, None, :].unbind(1)
        both = torch.cat((q, k), dim=1)
        a, b = both[..., :half], both[..., half:]
        out = torch.empty_like(both)
        torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin)
        return out[:, : q.shape[1]], out[:, q.shape[1] :]


# ---- attention --------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a layer does to its scores, see `base.Op`."""

    scale: float
    window: int | None
    softcap: float | None


def kv_shape(spec: KVSpec, num_blocks: int) -> tuple[int, ...]:
    """One layer's KV: a head's share of a block is one copy."""
    return (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)


def plan_rows(host: HostBatch | StepBatch) -> dict[str, NDArray[np.int32]]:
    """How the rows of a launch are worked through, made once and used by every layer.

    single   [n, 3] (row of the batch, request, tokens in the KV) of the requests with one new
             token, shortest first
    spans    [m, 4] (first row, rows, request, cached tokens) of the others
    """
    q_start, q_lens, seq_lens = (np.asarray(a) for a in (host.q_start, host.q_lens, host.seq_lens))
    single = np.flatnonzero(q_lens == 1)
    single = single[np.argsort(seq_lens[single], kind="stable")]
    spans = np.flatnonzero(q_lens > 1)
    return {
        "single": np.stack((q_start[single], single, seq_lens[single]), axis=1).astype(np.int32),
        "spans": np.stack(
            (q_start[spans], q_lens[spans], spans, seq_lens[spans] - q_lens[spans]), axis=1
        ).astype(np.int32),
    }


class PagedAttention(ReferenceOp):
    """Attention over blocks that are gathered head by head: kv_layer [num_blocks, 2, KH,
    block_size, D].
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
    ) -> Tensor:
        """[T, num_heads * head_dim]; k and v are written to the slots of the batch."""
        _write(k, v, kv_layer, batch.slots)
        extra = batch.extra if "single" in batch.extra else _plan(batch)
        rule = Rule(scale=scale, window=window, softcap=softcap)
        out = torch.zeros(q.shape, dtype=q.dtype)
        for part in _parts(extra["single"], kv_layer):
            rows = part[:, 0]
            out[rows] = _single(q[rows], kv_layer, batch, part, rule)
        for first, count, request, cached in extra["spans"].tolist():
            table = batch.block_table[request]
            for at in range(0, count, TILE_TOKENS):
                tile = slice(first + at, first + min(count, at + TILE_TOKENS))
                out[tile] = _span(q[tile], kv_layer, table, cached + at, rule)
        return out.view(q.shape[0], -1)


def _plan(batch: StepBatch) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in plan_rows(batch).items()}


def _write(k: Tensor, v: Tensor, kv_layer: Tensor, slots: Tensor) -> None:
    block_size = kv_layer.shape[3]
    block = torch.div(slots, block_size, rounding_mode="floor").long()
    both = torch.stack((k, v), dim=1).to(kv_layer.dtype)  # [T, 2, KH, D]
    kv_layer.permute(0, 3, 1, 2, 4).index_put_((block, (slots - block * block_size).long()), both)


def _parts(single: Tensor, kv_layer: Tensor) -> Iterator[Tensor]:
    """Neighbours in length whose gathered KV stays small; a longer one pads the shorter ones."""
    lengths = single[:, 2].tolist()
    per_chunk = CHUNK * 2 * kv_layer.shape[2] * kv_layer.shape[4]
    start = 0
    for end in range(1, len(lengths) + 1):
        if end < len(lengths):
            chunks = -(-lengths[end] // CHUNK)
            fits = (end + 1 - start) * chunks * per_chunk <= GATHER_ELEMENTS
            if fits and chunks <= 2 * -(-lengths[start] // CHUNK):
                continue
        yield single[start:end]
        start = end


def _gather(kv_layer: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys, values [S * KH, L, D] in float32, L = length up to CHUNK; table [S, blocks]."""
    KH, block_size, D = kv_layer.shape[2:]
    S, blocks = table.shape[0], -(-length // CHUNK) * (CHUNK // block_size)
    table = table[:, :blocks]
    if table.shape[1] < blocks:
        table = torch.nn.functional.pad(table, (0, blocks - table.shape[1]))
    heads = torch.arange(2 * KH, dtype=torch.int32).view(2, 1, KH, 1)
    index = (table[:, None, :] * (2 * KH) + heads).flatten()  # [2, S, KH, blocks]
    rows = kv_layer.view(-1, block_size * D).index_select(0, index)
    both = rows.float().view(2, S * KH, blocks * block_size, D)
    return both[0], both[1]


def _single(q: Tensor, kv_layer: Tensor, batch: StepBatch, part: Tensor, rule: Rule) -> Tensor:
    """Q [S, H, D], one row of each of S requests, all requests in one pass."""
    S, H, D = q.shape
    KH = kv_layer.shape[2]
    lengths = part[:, 2]
    keys, values = _gather(kv_layer, batch.block_table[part[:, 1]], int(lengths[-1]))
    tile = _tile(q.view(S * KH, H // KH, D), rule)
    last = (lengths - 1).repeat_interleave(KH)[:, None, None]
    return _attend(tile, keys, values, last, rule)[:, : H // KH].reshape(S, H, D).to(q.dtype)


def _span(q: Tensor, kv_layer: Tensor, table: Tensor, cached: int, rule: Rule) -> Tensor:
    """Q [n, H, D], neighbouring rows of one request, the first at position `cached`."""
    n, H, D = q.shape
    KH = kv_layer.shape[2]
    G = H // KH
    keys, values = _gather(kv_layer, table[None], cached + n)
    tile = _tile(q.view(n, KH, G, D).transpose(0, 1).reshape(KH, n * G, D), rule)
    last = torch.arange(cached, cached + n).repeat_interleave(G)
    last = torch.nn.functional.pad(last, (0, tile.shape[1] - n * G), value=cached)
    out = _attend(tile, keys, values, last[None, :, None], rule)[:, : n * G]
    return out.view(KH, n, G, D).transpose(0, 1).reshape(n, H, D).to(q.dtype)


def _tile(q: Tensor, rule: Rule) -> Tensor:
    """Scaled queries [B, R, D] in float32 with R padded to a multiple of ROWS."""
    q = q.float() * rule.scale
    missing = -q.shape[1] % ROWS
    return torch.nn.functional.pad(q, (0, 0, 0, missing)) if missing else q


def _attend(q: Tensor, keys: Tensor, values: Tensor, last: Tensor, rule: Rule) -> Tensor:
    """[B, R, D]; `last` (broadcast to [B, R, 1]) is the last key position that a row sees."""
    scores = torch.bmm(q, keys.transpose(1, 2))
    if rule.softcap is not None:
        scores = torch.tanh_(scores.div_(rule.softcap)).mul_(rule.softcap)
    at = torch.arange(scores.shape[2])
    hidden = at > last
    # what another request left there may be NaN, and 0 times NaN is NaN
    values.masked_fill_((at > last.amax(1))[..., None], 0)
    if rule.window is not None:
        hidden |= at <= last - rule.window
    p = torch.softmax(scores.masked_fill_(hidden, -torch.inf), dim=-1)
    out = torch.bmm(p[:, :, :CHUNK], values[:, :CHUNK])
    for start in range(CHUNK, p.shape[2], CHUNK):
        here = slice(start, start + CHUNK)
        out.baddbmm_(p[:, :, here], values[:, here])
    return out
