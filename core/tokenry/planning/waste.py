"""How much of the work on a load is padding.

In: how often each need occurs, a table of buckets. Out: tokens and KV blocks that were needed and
that are run, and the shares of the work that are padding, in all and per bucket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tokenry.backend.contract import Bucket, Caps
from tokenry.runner.buckets import BucketTable, Need, blocks_read


@dataclass(frozen=True, slots=True, kw_only=True)
class Waste:
    """Of some launches: tokens and blocks needed, tokens and blocks run. block_price: work of a
    block in tokens.
    """

    launches: int = 0
    tokens: int = 0
    tokens_run: int = 0
    blocks: int = 0
    blocks_run: int = 0
    block_price: float

    @property
    def work(self) -> float:
        """Needed, in tokens."""
        return self.tokens + self.block_price * self.blocks

    @property
    def work_run(self) -> float:
        """Run, in tokens."""
        return self.tokens_run + self.block_price * self.blocks_run

    @property
    def share(self) -> float:
        """Of the work that is run, what is padding."""
        return 1 - self.work / self.work_run if self.work_run else 0.0

    @property
    def token_share(self) -> float:
        """Of the tokens that are run, what is padding."""
        return 1 - self.tokens / self.tokens_run if self.tokens_run else 0.0

    @property
    def block_share(self) -> float:
        """Of the KV blocks that are read, what is padding."""
        return 1 - self.blocks / self.blocks_run if self.blocks_run else 0.0

    def plus(self, other: Waste) -> Waste:
        """Both together."""
        return Waste(
            launches=self.launches + other.launches,
            tokens=self.tokens + other.tokens,
            tokens_run=self.tokens_run + other.tokens_run,
            blocks=self.blocks + other.blocks,
            blocks_run=self.blocks_run + other.blocks_run,
            block_price=self.block_price,
        )


def waste_per_bucket(
    needs: Mapping[Need, int], table: BucketTable, caps: Caps, block_price: float
) -> dict[Bucket, Waste]:
    """What each bucket of the table is used for; unused ones have no launches."""
    found = {bucket: Waste(block_price=block_price) for bucket in table.buckets}
    for need, count in needs.items():
        bucket = table.choose(need)
        if bucket is None:
            continue  # a dynamic device runs it without padding
        blocks = 0 if caps.shapes.kv_axis == "none" else need.kv_total
        one = Waste(
            launches=count,
            tokens=need.tokens * count,
            tokens_run=bucket.tokens * count,
            blocks=blocks * count,
            blocks_run=blocks_read(bucket, caps) * count,
            block_price=block_price,
        )
        found[bucket] = found[bucket].plus(one)
    return found


def total(parts: Mapping[Bucket, Waste], block_price: float) -> Waste:
    """All buckets together."""
    whole = Waste(block_price=block_price)
    for part in parts.values():
        whole = whole.plus(part)
    return whole


def waste_of(needs: Counter[Need], buckets: list[Bucket], caps: Caps, block_price: float) -> Waste:
    """Of a load in these buckets."""
    table = BucketTable(buckets, caps, block_price)
    return total(waste_per_bucket(needs, table, caps, block_price), block_price)
