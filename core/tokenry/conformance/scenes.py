"""Launches as the core makes them: the only file here that knows the runner's way to pack.

In: requests (token ids and blocks) and which of their tokens to compute. Out: host batches in
buckets that are legal for the device, with the rows of each request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tokenry.backend.base import Backend, StepBatch
from tokenry.backend.contract import Bucket, Caps, HostBatch
from tokenry.params import SamplingParams
from tokenry.plan import NewRequest
from tokenry.runner.bucket_grid import make_buckets
from tokenry.runner.buckets import Need, choose, covers, exact, need_of
from tokenry.runner.pack import blank_batch, pack, table_width, to_device
from tokenry.runner.requests import RequestState
from tokenry.runner.shapes import Extent, Launch, Share, split


@dataclass(frozen=True, slots=True)
class Work:
    """Compute tokens [start, start + count) of a request, by its number."""

    request: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A host batch, and what each of its live rows is: (request, position)."""

    host: HostBatch
    works: tuple[Work, ...]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows of the batch that are live, request by request, in order of position."""
        spans = [
            np.arange(self.host.q_start[i], self.host.q_start[i] + work.count)
            for i, work in enumerate(self.works)
        ]
        return np.concatenate(spans)

    @property
    def owners(self) -> list[tuple[int, int]]:
        """(request, position) of each of `rows`."""
        return [(w.request, w.start + i) for w in self.works for i in range(w.count)]


class Scene:
    """Requests with blocks of their own, shuffled, from 1 on; block 0 is the null block.

    num_blocks   blocks of the KV that the scene needs; the last ones belong to nobody.
    """

    def __init__(
        self,
        caps: Caps,
        texts: Sequence[Sequence[int]],
        *,
        block_size: int,
        num_blocks: int = 0,
        seed: int = 0,
        room: int = 0,
    ) -> None:
        self.caps, self.texts, self.block_size = caps, [list(text) for text in texts], block_size
        counts = [-(-(len(text) + room) // block_size) for text in texts]
        self.num_blocks = max(num_blocks, sum(counts) + 3)
        order = np.random.default_rng(seed).permutation(np.arange(1, self.num_blocks - 1))
        free = [int(block) for block in order]
        self.blocks = [[free.pop() for _ in range(count)] for count in counts]
        longest = max(counts)
        tokens = sum(len(text) for text in texts)
        self.extent = Extent(
            max_seqs=max(4, len(texts)), max_tokens=max(tokens, 16), max_blocks=longest
        )
        self.buckets = make_buckets(caps, self.extent)

    def launches(self, works: Sequence[Work], *, spare: bool = False) -> Iterator[Packed]:
        """The launches that the core would make of these works.

        spare: in a bucket with more rows than needed, where the device knows no fixed shapes.
        """
        shares = [
            Share(row=i, start=w.start, count=w.count, sample=True) for i, w in enumerate(works)
        ]
        for launch in split(shares, self.caps, self.extent):
            mine = tuple(works[share.row] for share in launch.shares)
            bucket, need = self._bucket(launch, spare=spare)
            yield Packed(self._pack(launch, mine, bucket, need), mine)

    def covering(self, works: Sequence[Work]) -> Iterator[Packed]:
        """One launch in every bucket that covers it; a work of one launch only."""
        shares = [
            Share(row=i, start=w.start, count=w.count, sample=True) for i, w in enumerate(works)
        ]
        launches = list(split(shares, self.caps, self.extent))
        for launch in launches[:1]:
            mine = tuple(works[share.row] for share in launch.shares)
            need = need_of(launch, self.block_size)
            for bucket in self.buckets or [self._bucket(launch, spare=s)[0] for s in (False, True)]:
                if covers(bucket, need, self.caps):
                    yield Packed(self._pack(launch, mine, bucket, need), mine)

    def _bucket(self, launch: Launch, *, spare: bool) -> tuple[Bucket, Need]:
        need = need_of(launch, self.block_size)
        found = choose(need, self.buckets, self.caps) or exact(need, self.caps)
        if spare and not self.caps.shapes.static:
            q = found.tokens // found.seqs if self.caps.shapes.uniform_q else 1
            found = replace(found, seqs=found.seqs + 2, tokens=found.tokens + 2 * q + (q == 1))
            if found.phase == "decode" or self.caps.shapes.uniform_q:
                found = replace(found, tokens=found.seqs * max(1, q))
        return found, need

    def _pack(self, launch: Launch, works: Sequence[Work], bucket: Bucket, need: Need) -> HostBatch:
        packed = pack(
            launch,
            [self._state(work.request) for work in works],
            bucket,
            width=table_width(bucket, need, self.caps, self.extent.max_blocks),
            block_size=self.block_size,
            uniform_q=self.caps.shapes.uniform_q,
        )
        return packed.host

    def _state(self, request: int) -> RequestState:
        new = NewRequest(
            request_id=str(request),
            token_ids=tuple(self.texts[request]),
            num_prompt=len(self.texts[request]),
            params=SamplingParams(),
            seed=0,
            block_ids=tuple(self.blocks[request]),
        )
        return RequestState(new, self.block_size)

    def blank(self, packed: Packed) -> HostBatch:
        """The batch that a program for this bucket is made with before service: as at warm-up, no
        row of it is longer than a request can be.
        """
        host = packed.host
        return blank_batch(
            host.bucket,
            host.block_table.shape[1],
            uniform_q=self.caps.shapes.uniform_q,
            max_len=self.extent.max_blocks * self.block_size,
        )


def on_device(host: HostBatch, backend: Backend) -> StepBatch:
    """As the runner brings it there."""
    return to_device(host, backend)[0]
