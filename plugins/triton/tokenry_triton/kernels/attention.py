"""Attention over paged KV: one kernel for prefill, chunks and decode, one that merges splits.

A program takes M rows (TOKENS tokens of one request times GROUP query heads that share a KV head,
GROUP a power of two) and walks keys in tiles of N, always from multiples of N: the order in which a
row's values are added follows from its position alone, but for splits, which follow from its
request's length. Softmax as in FlashAttention (Dao, arXiv 2205.14135); the search for a tile's
request in the packed batch follows vLLM's unified kernel (triton_unified_attention.py).
"""

import triton
import triton.language as tl

from tokenry_triton.kernels.rows import tanh

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def write_kv(
    k, v, kv, slots, kv_scales, k_row, k_head, v_row, v_head, plane, block_stride, slot_stride,
    head_stride, heads, dim, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    SCALED: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """k, v [T, KH, D] to their slots; what goes to block 0, which nobody reads, stays away.

    SCALED: they are divided by kv_scales [2, KH]; MOST: what a float8 holds at most, 0: no limit.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, DIM)[None, :]
    inside = (head < heads) & (at < dim) & (slot >= BLOCK_SIZE)
    to = kv + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride
    to = to + head * head_stride + at
    key = tl.load(k + token * k_row + head * k_head + at, mask=inside, other=0.0)
    value = tl.load(v + token * v_row + head * v_head + at, mask=inside, other=0.0)
    if SCALED:
        key = key.to(tl.float32) / tl.load(kv_scales + head, mask=head < heads, other=1.0)
        value = value.to(tl.float32)
        value = value / tl.load(kv_scales + heads + head, mask=head < heads, other=1.0)
    if MOST > 0:  # not every device's conversion saturates
        key = tl.clamp(key.to(tl.float32), -MOST, MOST)
        value = tl.clamp(value.to(tl.float32), -MOST, MOST)
    tl.store(to, key.to(kv.dtype.element_ty), mask=inside)
    tl.store(to + plane, value.to(kv.dtype.element_ty), mask=inside)


@triton.jit
def request_of(tile, q_start, seqs, steps, TOKENS: tl.constexpr):
    """The request of a tile, when request i's tiles begin at q_start[i] // TOKENS + i."""
    low = tl.zeros([], tl.int32)
    high = low + seqs
    for _ in range(steps):  # low <= request < high
        middle = (low + high) // 2
        first = tl.load(q_start + middle) // TOKENS + middle
        past = (first > tile) | (high - low <= 1)
        high = tl.where(past & (high - low > 1), middle, high)
        low = tl.where(past, low, middle)
    return low


@triton.jit
def split_length(length, SPLIT: tl.constexpr, MOST: tl.constexpr):
    """Keys of one split: SPLIT, or a multiple of it where MOST splits would not do."""
    return tl.cdiv(tl.cdiv(length, MOST), SPLIT) * SPLIT


@triton.jit
def with_sink(peak, mass, total, sink):
    """One more score, a head's learned one, below which nothing lies (GPT-OSS, arXiv 2508.10925).

    peak, mass, sink of one shape, in powers of 2; total [..., DIM].
    """
    higher = tl.maximum(peak, sink)
    shrink = tl.exp2(peak - higher)
    return mass * shrink + tl.exp2(sink - higher), total * tl.expand_dims(shrink, -1)


@triton.jit
def _walk(
    queries, base, entries, position, live, begin, end, plane, block_stride, slot_stride, dim,
    scale, softcap, window, BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DIM: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Keys begin .. end of one request for M rows: the peaks of their scores, the masses below
    them, the sums of values [M, DIM] that go with both.
    """
    at = tl.arange(0, DIM)
    peak = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    total = tl.zeros([M, DIM], tl.float32)
    for n in range(begin, end, N):
        where = n + tl.arange(0, N)
        there = where < end
        block = tl.load(entries + where // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        source = base + block * block_stride + where % BLOCK_SIZE * slot_stride
        keys = tl.load(
            source[None, :] + at[:, None], mask=there[None, :] & (at < dim)[:, None], other=0.0
        )
        scores = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        seen = there[None, :] & (where[None, :] <= position[:, None]) & live[:, None]
        if WINDOW:
            seen = seen & (where[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores * LOG2E, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(peak - finite)
        p = tl.exp2(scores - finite[:, None])
        values = tl.load(
            source[:, None] + plane + at[None, :],
            mask=there[:, None] & (at < dim)[None, :], other=0.0,
        ).to(queries.dtype)  # fmt: skip
        mass = mass * shrink + tl.sum(p, 1)
        total = total * shrink[:, None]
        total = tl.dot(p.to(values.dtype), values, total, input_precision="ieee")
        peak = higher
    return peak, mass, total


@triton.jit
def _keys_of(
    first, new, length, window, N: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr,
    SPLIT: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """The keys that TOKENS tokens see, the first of them number `first` of `new`; of this split."""
    before = length - new + first
    begin = 0
    if WINDOW:
        begin = tl.maximum(0, before - window + 1) // N * N
    end = tl.where(first < new, tl.minimum(length, before + TOKENS), 0)
    if SPLIT > 0:
        share = split_length(length, SPLIT, MOST)
        begin = tl.maximum(begin, tl.program_id(2) * share)
        end = tl.minimum(end, (tl.program_id(2) + 1) * share)
    return begin, end


@triton.jit(do_not_specialize=["seqs", "steps", "table_row"])  # they change from step to step
def attend(
    q, kv, out, parts, peaks, sums, q_start, q_lens, seq_lens, table, sinks, kv_scales,
    q_row, q_head, plane, block_stride, slot_stride, head_stride, table_row,
    seqs, steps, heads, group, dim, scale, softcap, window,
    BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, DECODE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, SPLIT: tl.constexpr, MOST: tl.constexpr, SINKS: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Store out [T, heads * dim]; with SPLIT the sums, not yet divided, go to parts [T, heads,
    splits, dim], their peaks and masses to peaks and sums [T, heads, splits] instead.

    SINKS: a score more for each head, sinks [heads]. SCALED: kv_scales [2, KH] widen keys, values.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    if DECODE:  # one row a request, padded ones too
        request = tile
        start = tile
        first = 0
    else:
        request = request_of(tile, q_start, seqs, steps, TOKENS)
        start = tl.load(q_start + request)
        first = (tile - start // TOKENS - request) * TOKENS
    new = tl.load(q_lens + request)
    length = tl.load(seq_lens + request)
    row = tl.arange(0, M)
    token = first + row // GROUP
    member = row % GROUP
    live = (row // GROUP < TOKENS) & (token < new) & (member < group)
    at = tl.arange(0, DIM)
    packed = (start + token).to(tl.int64)
    head = kv_head * group + member
    position = length - new + token
    begin, end = _keys_of(first, new, length, window, N, TOKENS, WINDOW, SPLIT, MOST)
    inside = live[:, None] & (at < dim)[None, :]
    queries = tl.load(
        q + packed[:, None] * q_row + head[:, None] * q_head + at[None, :], mask=inside, other=0.0
    )
    if SCALED:
        scale = scale * tl.load(kv_scales + kv_head)
    peak, mass, total = _walk(
        queries, kv + kv_head.to(tl.int64) * head_stride, table + request.to(tl.int64) * table_row,
        position, live, begin, end, plane, block_stride, slot_stride, dim, scale, softcap, window,
        BLOCK_SIZE, M, N, DIM, SOFTCAP, WINDOW,
    )  # fmt: skip
    if SCALED:
        total = total * tl.load(kv_scales + heads // group + kv_head)
    if SPLIT > 0:
        splits = tl.num_programs(2)
        place = (packed * heads + head) * splits + tl.program_id(2)
        live = live & (peak > float("-inf"))
        tl.store(parts + place[:, None] * dim + at[None, :], total, mask=inside & live[:, None])
        tl.store(peaks + place, peak, mask=live)
        tl.store(sums + place, mass, mask=live)
    else:
        if SINKS:
            sink = tl.load(sinks + head, mask=member < group, other=0.0).to(tl.float32) * LOG2E
            mass, total = with_sink(peak, mass, total, sink)
        total = total / tl.where(mass > 0, mass, 1.0)[:, None]
        if DECODE:  # the row of a padded request is written too: with 0
            inside = ((row < GROUP) & (member < group))[:, None] & (at < dim)[None, :]
        to = out + (packed * heads + head)[:, None] * dim + at[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def merge(
    parts, peaks, sums, out, seq_lens, sinks, splits, dim,
    DIM: tl.constexpr, SPLIT: tl.constexpr, MOST: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Store out [T, heads * dim] of a decode's splits, from a request's first to its last.

    Splits that a window left out were not stored: their peak is -inf.
    """
    row = tl.program_id(0).to(tl.int64)
    place = row * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(seq_lens + row)
    at = tl.arange(0, DIM)
    peak = tl.full([], float("-inf"), tl.float32)
    mass = tl.zeros([], tl.float32)
    total = tl.zeros([DIM], tl.float32)
    many = tl.minimum(splits, tl.cdiv(length, tl.maximum(1, split_length(length, SPLIT, MOST))))
    for i in range(0, many):
        one = place * splits + i
        own = tl.load(peaks + one)
        there = own > float("-inf")
        part = tl.load(parts + one * dim + at, mask=at < tl.where(there, dim, 0), other=0.0)
        more = tl.load(sums + one, mask=there, other=0.0)
        higher = tl.maximum(peak, own)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        before, now = tl.exp2(peak - finite), tl.exp2(own - finite)
        total = total * before + part * now
        mass = mass * before + more * now
        peak = higher
    if SINKS:
        sink = tl.load(sinks + tl.program_id(1)).to(tl.float32) * LOG2E
        mass, total = with_sink(peak, mass, total, sink)
    total = total / tl.where(mass > 0, mass, 1.0)
    tl.store(out + place * dim + at, total.to(out.dtype.element_ty), mask=at < dim)
