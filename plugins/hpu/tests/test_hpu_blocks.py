"""The flat list of blocks that a launch's attention reads, and the plan of the memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.backend.contract import Bucket, HostBatch, KVSpec
from tokenry.errors import UncoveredShape
from tokenry_hpu.memory import plan_kv
from tokenry_hpu.ops import flat_blocks

BLOCK = 16
GIB = 2**30


def batch_of(lens, kv_blocks, *, rows, table=None):
    """A decode batch of so many tokens per request, padded to `rows` and `kv_blocks`."""
    width = max(1, *(-(-n // BLOCK) for n in lens)) if lens else 1
    blocks = np.zeros((rows, width), np.int32)
    ids = iter(range(1, 1000))
    for row, length in enumerate(lens):
        count = -(-length // BLOCK)
        blocks[row, :count] = [next(ids) for _ in range(count)]
    seq_lens = np.zeros(rows, np.int32)
    seq_lens[: len(lens)] = lens
    return HostBatch(
        bucket=Bucket("decode", rows, rows, kv_blocks),
        token_ids=np.zeros(rows, np.int32),
        positions=np.maximum(seq_lens - 1, 0),
        slots=np.zeros(rows, np.int32),
        q_start=np.arange(rows + 1, dtype=np.int32),
        q_lens=np.minimum(seq_lens, 1),
        seq_lens=seq_lens,
        block_table=blocks if table is None else table,
        logit_rows=np.zeros(rows, np.int32),
        prev_row=np.full(rows, -1, np.int32),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 5))
def test_every_token_of_every_request_is_listed_once(lens, more_rows, more_blocks):
    total = sum(-(-n // BLOCK) for n in lens)
    host = batch_of(lens, total + more_blocks, rows=len(lens) + more_rows)
    flat = flat_blocks(host, BLOCK)
    assert all(a.shape == (total + more_blocks,) and a.dtype == np.int32 for a in flat.values())
    seen = [
        (row, base + i, block)
        for block, row, used, base in zip(*flat.values(), strict=True)
        for i in range(used)
    ]
    wanted = [
        (row, position, host.block_table[row, position // BLOCK])
        for row, length in enumerate(lens)
        for position in range(length)
    ]
    assert seen == wanted
    padding = flat["block_groups"] == -1
    assert padding.sum() == more_blocks
    assert not flat["block_list"][padding].any()
    assert not flat["block_usage"][padding].any()


def test_more_blocks_than_the_bucket_holds_is_an_error_of_ours():
    with pytest.raises(UncoveredShape, match="holds 4 blocks"):
        flat_blocks(batch_of([33, 2], 3, rows=2), BLOCK)


def test_a_blank_batch_may_claim_more_blocks_than_its_bucket():
    host = batch_of([100], 2, rows=1, table=np.zeros((1, 4), np.int32))
    flat = flat_blocks(host, BLOCK)
    assert flat["block_usage"].tolist() == [16, 16]
    assert not flat["block_list"].any()


class Counters:
    """A device's counters, as the vendor's module gives them; the probe moves the peak."""

    def __init__(self, total, used):
        self.total, self.used, self.peak = total, used, used

    def mem_get_info(self):
        return self.total - self.used, self.total

    def max_memory_allocated(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.peak = self.used

    def synchronize(self):
        pass


SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_dim=64, block_size=128, dtype="bfloat16")


def test_the_ledger_has_the_peak_and_what_is_kept_for_programs():
    hpu = Counters(96 * GIB, 30 * GIB)
    hpu.peak = 90 * GIB  # of loading: not a step's

    def probe():
        hpu.peak = 34 * GIB

    plan = plan_kv(hpu, SPEC, 86 * GIB, probe, fraction=0.5)
    ledger = plan.ledger
    room = 86 * GIB - 30 * GIB - 4 * GIB - ledger["margin"]
    assert ledger["weights"] == 30 * GIB
    assert ledger["activations"] == 4 * GIB
    assert ledger["margin"] == 86 * GIB // 50
    assert ledger["programs"] == room // 2
    assert ledger["kv"] == plan.num_blocks * SPEC.block_bytes
    assert 0 <= 86 * GIB - sum(ledger.values()) < SPEC.block_bytes + 1


def test_no_room_is_no_blocks_and_nothing_negative():
    plan = plan_kv(Counters(96 * GIB, 90 * GIB), SPEC, 86 * GIB, None, fraction=0.1)
    assert plan.num_blocks == 0
    assert min(plan.ledger.values()) >= 0
