"""Which launches a step becomes.

In: the rows of a plan, a device's ShapeRules and PhaseRules. Out: launches, rows that may share a
program. Pure functions of numbers: no tensors, no requests. The shapes that a launch may have are
next door, in buckets.py.

Devices that cannot mix prefill and decode get phase-pure launches. Rows share a launch only while
the largest bucket can hold them: where rows are padded to one length, as long as the padded rows
stay within the token budget; where blocks are counted over the batch, as long as they are no more
than the device has (rows that share a prefix count it each).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from tokenry.backend.contract import Caps, Phase

SCORED_TOKENS = 256
"""Most tokens whose full logits a launch computes for prompt log-probabilities (bounds [tokens,
vocab] floats).
"""


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What one launch computes of one row of the plan: tokens [start, start + count) of the
    request.

    row      index in the plan's rows.
    sample   a token is drawn after the last of them.
    scored   the logits of every one of them are wanted.
    """

    row: int
    start: int
    count: int
    sample: bool
    scored: bool = False


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that one program computes together."""

    phase: Phase
    shares: tuple[Share, ...]
    scored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The largest step that can come: what buckets must cover.

    max_blocks    of one request.
    block_size    tokens per block; None: unknown, then shapes that cannot come are not left out.
    total_blocks  most in one launch where a device counts them over the batch; None: no limit. No
                  less than max_blocks.
    """

    max_seqs: int
    max_tokens: int
    max_blocks: int
    block_size: int | None = None
    total_blocks: int | None = None

    def batch_blocks(self, seqs: int) -> int:
        """Most KV blocks of a launch of that many requests, counted over the batch."""
        most = self.max_blocks * seqs
        if self.total_blocks is None or self.block_size is None:
            return most
        return min(most, max(self.max_blocks, self.total_blocks))


def split(shares: Sequence[Share], caps: Caps, extent: Extent) -> Iterator[Launch]:
    """The launches of a step, in an order in which a request's parts follow each other."""
    plain = [s for s in shares if not s.scored]
    for share in shares:
        if share.scored:
            for part in _parts(share, scored_tokens(caps, extent)):
                phase: Phase = "mixed" if caps.phases.mixed else "prefill"
                yield Launch(phase=phase, shares=(part,), scored=True)
    if caps.phases.mixed:
        pure = not caps.shapes.static and all(_decodes(s, caps) for s in plain)
        for rows in _grouped(plain, caps, extent, len(plain)):
            yield Launch(phase="decode" if pure else "mixed", shares=tuple(rows))
        return
    decode = [s for s in plain if _decodes(s, caps)]
    prefill = [s for s in plain if not _decodes(s, caps)]
    most = caps.phases.max_prefill_seqs or len(prefill)
    budget = extent.max_tokens if caps.shapes.uniform_q else None
    for rows in _grouped(prefill, caps, extent, most, padded_tokens=budget):
        yield Launch(phase="prefill", shares=tuple(rows))
    for rows in _grouped(decode, caps, extent, len(decode)):
        yield Launch(phase="decode", shares=tuple(rows))


def scored_tokens(caps: Caps, extent: Extent) -> int:
    """Tokens of a launch with logits "all": the smallest prefill bucket on static devices, the
    largest where a prompt cannot be continued.
    """
    step = max(caps.shapes.multiple_of.get("tokens", 1), 1)
    if not caps.phases.chunked:
        return -(-extent.max_tokens // step) * step
    if caps.shapes.static:
        return step
    return min(SCORED_TOKENS, extent.max_tokens)


def _grouped(
    shares: Sequence[Share],
    caps: Caps,
    extent: Extent,
    most: int,
    *,
    padded_tokens: int | None = None,
) -> Iterator[list[Share]]:
    """Rows that share a launch, in order: at most `most`, within `padded_tokens` after padding to
    the longest, and within the blocks that a device with a count over the batch has.
    """
    size = extent.block_size if caps.shapes.static and caps.shapes.kv_axis == "total" else None
    if size is None and padded_tokens is None and 0 < len(shares) <= most:
        yield list(shares)
        return
    together: list[Share] = []
    longest = blocks = 0
    for share in shares:
        own = -(-(share.start + share.count) // size) if size is not None else 0
        longest, blocks = max(longest, share.count), blocks + own
        n = len(together) + 1
        wide = padded_tokens is not None and n * longest > padded_tokens
        if together and (n > most or wide or (size and blocks > extent.batch_blocks(n))):
            yield together
            together, longest, blocks = [], share.count, own
        together.append(share)
    if together:
        yield together


def _decodes(share: Share, caps: Caps) -> bool:
    return share.start > 0 and share.count <= caps.phases.max_decode_q


def _parts(share: Share, most: int) -> Iterator[Share]:
    end = share.start + share.count
    for start in range(share.start, end, most):
        count = min(most, end - start)
        last = start + count == end
        yield Share(
            row=share.row, start=start, count=count, sample=share.sample and last, scored=True
        )
