"""One launch as arrays, then as tensors: one int32 buffer, one copy to the device.

In: shares of a plan with the requests' host state, and the bucket. Out: `HostBatch`, `StepBatch`.
The layout of the
buffer is fixed by the bucket, so a captured program always finds its inputs in the same places.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import Backend, StepBatch
from tokenry.backend.contract import Bucket, Caps, HostBatch, IntArray
from tokenry.runner.buckets import Need
from tokenry.runner.requests import RequestState
from tokenry.runner.shapes import Launch, Share

FIELDS = (
    "token_ids", "positions", "slots", "prev_row", "q_start", "q_lens", "seq_lens", "block_table",
    "logit_rows",
)  # fmt: skip
_in_order = operator.attrgetter(*FIELDS)


class Packed(msgspec.Struct, frozen=True):
    """A launch, ready to copy.

    host        its arrays.
    buffer      where they lie, one after the other, in the order of FIELDS.
    feeds_back  some token is to be taken from the last step's sampled ones.
    """

    host: HostBatch
    buffer: IntArray
    feeds_back: bool


def table_width(bucket: Bucket, need: Need, caps: Caps, max_blocks: int) -> int:
    """Columns of the block table: the bucket's, the widest the device can meet, or just what is
    needed.
    """
    if caps.shapes.kv_axis == "per_seq":
        return bucket.kv_blocks
    return max_blocks if caps.shapes.static or caps.graphs != "none" else need.kv_widest


def pack(
    launch: Launch,
    states: Sequence[RequestState],
    bucket: Bucket,
    *,
    width: int,
    block_size: int,
    uniform_q: bool,
) -> Packed:
    """Fill a launch's arrays; `states` are the requests of its shares, in order."""
    T, S = bucket.tokens, bucket.seqs
    buffer, arrays = _blank(bucket, width)
    shares = launch.shares
    counts = [share.count for share in shares]
    ends = [share.start + share.count for share in shares]
    n, q = len(counts), T // S
    if uniform_q:
        firsts = list(range(0, n * q, q))
    else:
        firsts = list(itertools.accumulate(counts[:-1], initial=0))
    if max(counts) == 1:
        feeds_back = _fill_single(shares, states, firsts, arrays, block_size)
    else:
        feeds_back = _fill_chunks(shares, states, firsts, arrays, block_size)
    arrays["q_lens"][:n] = counts
    arrays["seq_lens"][:n] = ends
    arrays["q_start"][:n] = firsts
    rest = np.minimum(np.arange(n, S + 1) * q, T) if uniform_q else sum(counts)
    arrays["q_start"][n:] = rest
    if bucket.logits == "all":
        arrays["logit_rows"][:] = np.arange(T, dtype=np.int32)
    else:
        lasts = [first + count - 1 for first, count in zip(firsts, counts, strict=True)]
        arrays["logit_rows"][:n] = lasts
    return Packed(_host_batch(bucket, arrays), buffer, feeds_back)


def _fill_single(
    shares: Sequence[Share],
    states: Sequence[RequestState],
    firsts: Sequence[int],
    arrays: dict[str, IntArray],
    block_size: int,
) -> bool:
    """Rows of one token each: known tokens from the host, the others from the device."""
    feeds_back = False
    token_ids, prev_row, table = arrays["token_ids"], arrays["prev_row"], arrays["block_table"]
    positions, slots = arrays["positions"], arrays["slots"]
    for i, (at, share, state) in enumerate(zip(firsts, shares, states, strict=True)):
        start, blocks = share.start, state.blocks
        last, offset = divmod(start, block_size)
        table[i, : last + 1] = blocks[: last + 1]
        positions[at] = start
        slots[at] = int(blocks[last]) * block_size + offset
        if start < state.num_known:
            token_ids[at] = state.tokens[start]
        else:
            prev_row[at] = _feedback(state)
            feeds_back = True
    return feeds_back


def _fill_chunks(
    shares: Sequence[Share],
    states: Sequence[RequestState],
    firsts: Sequence[int],
    arrays: dict[str, IntArray],
    block_size: int,
) -> bool:
    """Rows of any length; only a row's last token can be unknown to the host."""
    feeds_back = False
    for i, (a, share, state) in enumerate(zip(firsts, shares, states, strict=True)):
        b, end = a + share.count, share.start + share.count
        known = min(end, state.num_known)
        arrays["token_ids"][a : a + known - share.start] = state.tokens[share.start : known]
        if end > state.num_known:
            arrays["prev_row"][b - 1] = _feedback(state)
            feeds_back = True
        used = -(-end // block_size)
        arrays["block_table"][i, :used] = state.blocks[:used]
        at = np.arange(share.start, end, dtype=np.int32)
        arrays["positions"][a:b] = at
        arrays["slots"][a:b] = state.blocks[at // block_size] * block_size + at % block_size
    return feeds_back


def _host_batch(bucket: Bucket, arrays: dict[str, IntArray]) -> HostBatch:
    fields: Any = arrays
    return HostBatch(bucket=bucket, **fields)


def _feedback(state: RequestState) -> int:
    assert state.feedback is not None, "planned a token that was never sampled"
    return state.feedback


def _blank(bucket: Bucket, width: int) -> tuple[IntArray, dict[str, IntArray]]:
    """Zeroed arrays of a bucket, prev_row -1, as views of one buffer, which comes first."""
    rows = bucket.tokens if bucket.logits == "all" else bucket.seqs
    places = _places(bucket.tokens, bucket.seqs, rows, width)
    buffer = np.zeros(places[-1].stop, np.int32)
    arrays: dict[str, IntArray] = {
        name: buffer[place] for name, place in zip(FIELDS, places, strict=True)
    }
    arrays["block_table"] = arrays["block_table"].reshape(bucket.seqs, width)
    arrays["prev_row"].fill(-1)
    return buffer, arrays


@functools.lru_cache(1024)
def _places(tokens: int, seqs: int, rows: int, width: int) -> tuple[slice, ...]:
    """Where in the buffer each of the FIELDS lies."""
    sizes = (tokens, tokens, tokens, tokens, seqs + 1, seqs, seqs, seqs * width, rows)
    ends = itertools.accumulate(sizes)
    return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))


def blank_batch(
    bucket: Bucket, width: int, *, uniform_q: bool, max_len: int | None = None
) -> HostBatch:
    """A batch of rows on the null block, as large as the bucket: for warm-up, capture and probing.

    Every row is live (q_lens fill the bucket) so that the worst case is what runs; all KV goes to
    block 0.

    max_len  most tokens of a request: no row is longer, and what a bucket holds beyond is padding,
             as in a step; None: any length can come.
    """
    arrays = _blank(bucket, width)[1]
    T, S = bucket.tokens, bucket.seqs
    q = max(1, T // S)
    lens = np.full(S, q, np.int32)
    lens[-1] = q if uniform_q else T - q * (S - 1)
    if max_len is not None:
        lens = np.minimum(lens, np.int32(max_len))
    ends = np.cumsum(lens)
    firsts = np.arange(S, dtype=np.int32) * q if uniform_q else ends - lens
    arrays["q_lens"][:] = lens
    arrays["seq_lens"][:] = lens
    arrays["q_start"][:S] = firsts
    arrays["q_start"][S] = min(S * q, T) if uniform_q else ends[-1]
    at = np.arange(ends[-1]) - np.repeat(ends - lens, lens)
    arrays["positions"][np.repeat(firsts, lens) + at] = at
    arrays["logit_rows"][:] = np.arange(T) if bucket.logits == "all" else firsts + lens - 1
    return _host_batch(bucket, arrays)


def to_device(
    host: HostBatch, backend: Backend, buffer: IntArray | None = None
) -> tuple[StepBatch, Tensor]:
    """The batch on the device, and prev_row beside it: one buffer, one copy.

    buffer  holds the arrays already, as `Packed` says.
    """
    extra = {**host.extra, **backend.attn_inputs(host)}
    arrays: list[NDArray[Any]] = [*_in_order(host), *extra.values()]
    if buffer is None or extra:
        buffer = np.concatenate([array.reshape(-1) for array in arrays], dtype=np.int32)
    source = torch.from_numpy(buffer)
    if backend.caps.pinned_inputs:
        source = source.pin_memory()
    whole = source.to(backend.caps.input_device, non_blocking=True)
    parts = whole.split_with_sizes([array.size for array in arrays])
    token_ids, positions, slots, prev_row, q_start, q_lens, seq_lens, table, rows, *more = parts
    batch = StepBatch(
        bucket=host.bucket,
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        q_start=q_start,
        q_lens=q_lens,
        seq_lens=seq_lens,
        block_table=table.view(host.block_table.shape),
        logit_rows=rows,
        extra={
            name: part.view(array.shape)
            for (name, array), part in zip(extra.items(), more, strict=True)
        },
    )
    return batch, prev_row
