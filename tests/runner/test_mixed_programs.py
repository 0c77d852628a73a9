"""Programs of small mixed steps on a device that is not static (ShapeRules.mixed_tokens)."""

from __future__ import annotations

import pytest

from tokenry.backend.contract import Caps, ShapeRules
from tokenry.runner.bucket_grid import make_buckets
from tokenry.runner.buckets import BucketTable, Need
from tokenry.runner.shapes import Extent


def table(mixed_tokens, *, max_seqs=24, max_tokens=512, max_programs=64):
    caps = Caps(
        graphs="capture",
        shapes=ShapeRules(mixed_tokens=mixed_tokens, max_programs=max_programs),
    )
    extent = Extent(max_seqs=max_seqs, max_tokens=max_tokens, max_blocks=8, block_size=16)
    return BucketTable(make_buckets(caps, extent), caps)


def need(seqs, tokens):
    return Need("mixed", seqs, tokens, tokens - seqs + 1, 4, 4)


@pytest.mark.parametrize(
    ("limit", "max_tokens", "programs"),
    [(64, 512, 64), (64, 48, 64), (7, 512, 64), (64, 512, 9)],
)
def test_every_mixed_step_up_to_the_limit_has_a_program(limit, max_tokens, programs):
    buckets = table(limit, max_tokens=max_tokens, max_programs=programs)
    assert len(buckets.buckets) <= programs
    most = min(limit, max_tokens)
    for tokens in range(1, most + 1):
        for seqs in range(1, min(tokens, 24) + 1):
            bucket = buckets.choose(need(seqs, tokens))
            assert bucket is not None, (seqs, tokens)
            assert bucket.seqs >= seqs
            assert most >= bucket.tokens >= tokens
            assert bucket.seqs <= bucket.tokens


def test_larger_mixed_steps_run_as_they_are_and_decode_is_as_before():
    buckets = table(64)
    assert buckets.choose(need(3, 65)) is None
    plain = table(0)
    assert {b.phase for b in plain.buckets} == {"decode"}
    assert plain.choose(need(1, 1)) is None
    decode = [b for b in buckets.buckets if b.phase == "decode"]
    assert decode == [b for b in plain.buckets if b.phase == "decode"]
