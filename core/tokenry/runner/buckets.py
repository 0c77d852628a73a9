"""What a launch needs, which buckets cover it, and which of them wastes least.

In: needs of launches, the warmed buckets. Out: the bucket to run in, or UncoveredShape on a device
that runs nothing else. Pure functions of numbers. Which buckets there are: bucket_grid.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from tokenry.backend.contract import Bucket, Caps, Phase
from tokenry.errors import UncoveredShape
from tokenry.runner.axes import AxisRule, Strategy
from tokenry.runner.shapes import Launch

BLOCK_PRICE = 0.2
"""Work of reading one KV block, in tokens computed. Of a Llama-3.1-8B with blocks of 128 tokens, a
block has 16.8 MB and a token 16 GFLOP; at 180 operations per byte of memory traffic, as today's
accelerators have, that is 16.8e6 * 180 / 16e9 = 0.19."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketSettings:
    """How the buckets are made.

    axes          rules by axis name, see bucket_grid.AXES.
    buckets       these (from a tuner) instead of axes; what they leave uncovered is added.
    max_programs  most programs; the device's own limit counts, too.
    block_price   work of reading a KV block, in tokens computed.
    """

    strategy: Strategy = "exponential"
    axes: Mapping[str, AxisRule] = field(default_factory=dict)
    buckets: tuple[Bucket, ...] = ()
    max_programs: int | None = None
    block_price: float = BLOCK_PRICE


class Need(msgspec.Struct, frozen=True):
    """What a launch needs at least; q is the longest row, kv_widest and kv_total count blocks."""

    phase: Phase
    seqs: int
    tokens: int
    q: int
    kv_widest: int
    kv_total: int
    scored: bool = False


def need_of(launch: Launch, block_size: int) -> Need:
    """What the launch needs of a bucket."""
    blocks = [-(-(s.start + s.count) // block_size) for s in launch.shares]
    counts = [s.count for s in launch.shares]
    return Need(
        phase=launch.phase,
        seqs=len(counts),
        tokens=sum(counts),
        q=max(counts),
        kv_widest=max(blocks),
        kv_total=sum(blocks),
        scored=launch.scored,
    )


def covers(bucket: Bucket, need: Need, caps: Caps) -> bool:
    """Whether the launch fits into the bucket."""
    if bucket.phase != need.phase or (bucket.logits == "all") != need.scored:
        return False
    return all(a >= b for a, b in zip(_room(bucket, caps), _wanted(need, caps), strict=True))


def _room(bucket: Bucket, caps: Caps) -> tuple[int, int, int]:
    """Sizes that a launch must not pass: rows, tokens (of a row where rows are padded to one
    length), KV blocks.
    """
    width = bucket.tokens // bucket.seqs if caps.shapes.uniform_q else bucket.tokens
    return bucket.seqs, width, bucket.kv_blocks


def _wanted(need: Need, caps: Caps) -> tuple[int, int, int]:
    """The launch's sizes, in the same order."""
    kv = {"none": 0, "per_seq": need.kv_widest, "total": need.kv_total}[caps.shapes.kv_axis]
    return need.seqs, need.q if caps.shapes.uniform_q else need.tokens, kv


def blocks_read(bucket: Bucket, caps: Caps) -> int:
    """KV blocks that a program of the bucket reads."""
    per_seq = caps.shapes.kv_axis == "per_seq"
    return bucket.kv_blocks * bucket.seqs if per_seq else bucket.kv_blocks


def work(bucket: Bucket, caps: Caps, block_price: float = BLOCK_PRICE) -> float:
    """Of one run of the bucket's program, in tokens computed."""
    return bucket.tokens + block_price * blocks_read(bucket, caps)


class BucketTable:
    """The warmed buckets, cheapest first. Owned by ModelRunner; only `choose` remembers."""

    def __init__(
        self, buckets: Sequence[Bucket], caps: Caps, block_price: float = BLOCK_PRICE
    ) -> None:
        self.buckets = tuple(buckets)
        self._caps = caps
        self._by_kind: dict[tuple[Phase, bool], list[tuple[int, int, int, Bucket]]] = {}
        self._chosen: dict[Need, Bucket | None] = {}
        order = sorted(
            buckets, key=lambda b: (work(b, caps, block_price), b.tokens, b.kv_blocks, b.seqs)
        )
        for bucket in order:
            kind = (bucket.phase, bucket.logits == "all")
            self._by_kind.setdefault(kind, []).append((*_room(bucket, caps), bucket))

    def choose(self, need: Need) -> Bucket | None:
        """The covering bucket with the least padding; None where a dynamic device has none, so it
        runs uncompiled.

        Raises UncoveredShape on a static device: an error of ours, never a silent compile.
        """
        if not (self.buckets or self._caps.shapes.static):
            return None
        if need in self._chosen:
            return self._chosen[need]
        found = self._find(need)
        if found is None and self._caps.shapes.static:
            raise UncoveredShape(f"No warmed bucket covers {need}; there are {len(self.buckets)}.")
        if len(self._chosen) >= MOST_REMEMBERED:
            self._chosen.clear()
        self._chosen[need] = found
        return found

    def _find(self, need: Need) -> Bucket | None:
        """The first that covers it; in every step, so a plain loop over numbers."""
        seqs, width, kv_blocks = _wanted(need, self._caps)
        for rows, wide, blocks, bucket in self._by_kind.get((need.phase, need.scored), ()):
            if rows >= seqs and wide >= width and blocks >= kv_blocks:
                return bucket
        return None


MOST_REMEMBERED = 4096


def choose(need: Need, buckets: Sequence[Bucket], caps: Caps) -> Bucket | None:
    """`BucketTable.choose` for one need."""
    return BucketTable(buckets, caps).choose(need)


def exact(need: Need, caps: Caps) -> Bucket:
    """A bucket without padding, for dynamic devices."""
    kv = {"none": 0, "per_seq": need.kv_widest, "total": need.kv_total}[caps.shapes.kv_axis]
    tokens = need.seqs * need.q if caps.shapes.uniform_q else need.tokens
    return Bucket(need.phase, need.seqs, tokens, kv, "all" if need.scored else "last")
