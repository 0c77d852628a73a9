"""The reference attention against a loop over tokens in float64, and what it must leave alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tokenry.backend.base import StepBatch
from tokenry.backend.contract import Bucket
from tokenry.backend.reference import REFERENCE_OPS

attention = REFERENCE_OPS["attention"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """rows: (cached, new) of each request; seqs, q: padding to so many requests (and rows each)."""

    rows: tuple[tuple[int, int], ...]
    seqs: int = 0
    q: int = 0
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    block_size: int = 4
    window: int | None = None
    softcap: float | None = None
    garbage: float = 1e4
    dtype: torch.dtype = torch.float32


def make(case: Case, seed: int = 0):
    """Batch, q, k, v and a KV layer with the cached tokens; every other slot is garbage."""
    rng = np.random.default_rng(seed)
    bs, S = case.block_size, max(case.seqs, len(case.rows))
    news = [new for _, new in case.rows]
    T = S * case.q if case.q else sum(news) + max(0, S - len(case.rows))
    MB = max(1, max((-(-(c + n) // bs) for c, n in case.rows), default=1)) + 1
    num_blocks = 1 + sum(-(-(c + n) // bs) for c, n in case.rows) + 3
    free = list(rng.permutation(np.arange(1, num_blocks)))
    kv = torch.full((2, num_blocks, bs, case.kv_heads, case.head_dim), case.garbage)
    positions, slots = np.zeros(T, np.int32), np.arange(T, dtype=np.int32) % bs
    q_start, q_lens = np.zeros(S + 1, np.int32), np.zeros(S, np.int32)
    seq_lens, table = np.zeros(S, np.int32), np.zeros((S, MB), np.int32)
    at = 0
    for i in range(S):
        cached, new = case.rows[i] if i < len(case.rows) else (0, 0)
        blocks = [free.pop() for _ in range(-(-(cached + new) // bs))]
        table[i, : len(blocks)] = blocks
        for p in range(cached):
            kv[:, blocks[p // bs], p % bs] = torch.from_numpy(
                rng.standard_normal((2, case.kv_heads, case.head_dim), np.float32)
            )
        for j in range(new):
            p = cached + j
            positions[at + j], slots[at + j] = p, blocks[p // bs] * bs + p % bs
        q_lens[i], seq_lens[i] = new, cached + new
        at += case.q or new
        q_start[i + 1] = at
    tensor = torch.from_numpy
    batch = StepBatch(
        bucket=Bucket("mixed", S, T, 0),
        token_ids=torch.zeros(T, dtype=torch.int32),
        positions=tensor(positions),
        slots=tensor(slots),
        q_start=tensor(q_start),
        q_lens=tensor(q_lens),
        seq_lens=tensor(seq_lens),
        block_table=tensor(table),
        logit_rows=torch.zeros(S, dtype=torch.int32),
        extra={},
    )
    shapes = [(T, h, case.head_dim) for h in (case.heads, case.kv_heads, case.kv_heads)]
    q, k, v = (tensor(rng.standard_normal(s, np.float32)).to(case.dtype) for s in shapes)
    return batch, q, k, v, kv.to(case.dtype)


def naive(case: Case, batch: StepBatch, *tensors):
    """The definition, token by token in float64; padding rows are 0."""
    q, k, v, kv = (x.double().numpy().copy() for x in tensors)
    bs, out = case.block_size, np.zeros(q.shape)
    for i in range(batch.bucket.seqs):
        first, n = int(batch.q_start[i]), int(batch.q_lens[i])
        for t in range(first, first + n):
            slot = int(batch.slots[t])
            kv[0, slot // bs, slot % bs], kv[1, slot // bs, slot % bs] = k[t], v[t]
        for t in range(first, first + n):
            p = int(batch.positions[t])
            low = 0 if case.window is None else max(0, p - case.window + 1)
            places = [(int(batch.block_table[i, j // bs]), j % bs) for j in range(low, p + 1)]
            for h in range(case.heads):
                g = h // (case.heads // case.kv_heads)
                scores = np.array([q[t, h] @ kv[0, b, o, g] for b, o in places]) * 0.3
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                w = np.exp(scores - scores.max())
                w /= w.sum()
                out[t, h] = sum(x * kv[1, b, o, g] for x, (b, o) in zip(w, places, strict=True))
    return out.reshape(len(q), -1)


CASES = {
    "one_token": Case(rows=((0, 1),)),
    "ragged": Case(rows=((0, 5), (7, 1), (3, 4))),
    "decode_only": Case(rows=((4, 1), (9, 1), (1, 1))),
    "padded_seqs": Case(rows=((4, 1), (9, 1)), seqs=4, q=1),
    "uniform_q_right_padded": Case(rows=((0, 5), (6, 2)), seqs=3, q=8),
    "empty_batch": Case(rows=(), seqs=2, q=4),
    "many_requests": Case(rows=tuple((i, 1 + i % 3) for i in range(12)), seqs=14),
    "many_requests_uniform": Case(rows=tuple((i, 1 + i % 3) for i in range(12)), seqs=16, q=4),
    "no_grouping": Case(rows=((2, 3), (0, 2)), heads=3, kv_heads=3),
    "one_kv_head": Case(rows=((2, 3), (0, 2)), heads=4, kv_heads=1),
    "window": Case(rows=((9, 5), (0, 7), (20, 1)), window=4),
    "window_many": Case(rows=tuple((i, 2) for i in range(10)), window=3),
    "softcap": Case(rows=((2, 3), (8, 1)), softcap=2.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_attention_agrees_with_a_loop_over_tokens(case):
    batch, q, k, v, kv = make(case)
    want = naive(case, batch, q, k, v, kv)
    got = attention(q, k, v, kv, batch, scale=0.3, window=case.window, softcap=case.softcap)
    assert got.shape == want.shape
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-5, atol=2e-5)


def test_attention_writes_the_slots_of_its_rows_and_nothing_else():
    case = Case(rows=((3, 4), (6, 1)), seqs=3, q=5)
    batch, q, k, v, kv = make(case)
    before = kv.clone()
    attention(q, k, v, kv, batch, scale=0.3)
    flat, old = kv.flatten(1, 2), before.flatten(1, 2)
    live = [int(batch.q_start[i]) + j for i in range(3) for j in range(int(batch.q_lens[i]))]
    slots = batch.slots[live].long()
    assert torch.equal(flat[0, slots], k[live]) and torch.equal(flat[1, slots], v[live])
    others = torch.ones(flat.shape[1], dtype=torch.bool)
    others[slots] = False
    others[: case.block_size] = False  # the null block takes the padding
    assert torch.equal(flat[:, others], old[:, others])


@pytest.mark.parametrize("many", [False, True], ids=["by_request", "by_token"])
def test_values_of_unused_slots_never_reach_a_result(many):
    rows = tuple((i, 1 + i % 2) for i in range(12 if many else 3))
    clean, dirty = Case(rows=rows, garbage=0.0), Case(rows=rows, garbage=float("nan"))
    results = []
    for case in (clean, dirty):
        batch, q, k, v, kv = make(case)
        results.append(attention(q, k, v, kv, batch, scale=0.3))
    assert torch.equal(*results) and results[1].isfinite().all()


def test_low_precision_attention_stays_close_to_float32():
    case = Case(rows=((5, 3), (9, 1)), dtype=torch.bfloat16)
    batch, q, k, v, kv = make(case, seed=3)
    want = naive(case, batch, q, k, v, kv)
    got = attention(q, k, v, kv, batch, scale=0.3)
    assert got.dtype == torch.bfloat16
    np.testing.assert_allclose(got.float().numpy(), want, rtol=2e-2, atol=2e-2)
