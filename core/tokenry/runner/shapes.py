"""Which launches a step becomes, and which shapes they may have.

In: the rows of a plan, a device's ShapeRules and PhaseRules. Out: launches (rows that may share a
program) and the
bucket that covers each. Pure functions of numbers: no tensors, no requests.

Devices that cannot mix prefill and decode get phase-pure launches from `split`; devices with static
shapes get every
bucket up front from `make_buckets`, so that the covering one can always be found and nothing
compiles in service.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenry.backend.contract import Bucket, Caps, Phase
from tokenry.errors import UncoveredShape

SCORED_TOKENS = 256
"""Most tokens whose full logits a launch computes for prompt log-probabilities (bounds [tokens,
vocab] floats).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Rows that one program computes together."""

    phase: Phase
    shares: tuple[Share, ...]
    scored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The largest step that can come: what buckets must cover."""

    max_seqs: int
    max_tokens: int
    max_blocks: int


def split(shares: Sequence[Share], caps: Caps, extent: Extent) -> Iterator[Launch]:
    """The launches of a step, in an order in which a request's parts follow each other."""
    plain = [s for s in shares if not s.scored]
    for share in shares:
        if share.scored:
            for part in _parts(share, scored_tokens(caps, extent)):
                phase: Phase = "mixed" if caps.phases.mixed else "prefill"
                yield Launch(phase=phase, shares=(part,), scored=True)
    if caps.phases.mixed:
        if plain:
            pure = not caps.shapes.static and all(_decodes(s, caps) for s in plain)
            phase = "decode" if pure else "mixed"
            yield Launch(phase=phase, shares=tuple(plain))
        return
    decode = tuple(s for s in plain if _decodes(s, caps))
    prefill = [s for s in plain if not _decodes(s, caps)]
    most = caps.phases.max_prefill_seqs or max(1, len(prefill))
    for i in range(0, len(prefill), most):
        yield Launch(phase="prefill", shares=tuple(prefill[i : i + most]))
    if decode:
        yield Launch(phase="decode", shares=decode)


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


# ---- buckets ---------------------------------------------------------------------------------


def doubling(low: int, high: int, step: int = 1) -> list[int]:
    """low, then doubled, rounded up to multiples of step, up to high (rounded up) itself."""
    top = -(-high // step) * step
    values, value = {top}, max(low, step)
    while value < top:
        values.add(-(-value // step) * step)
        value *= 2
    return sorted(values)


def make_buckets(caps: Caps, extent: Extent) -> list[Bucket]:
    """Every bucket of a static device, or the captured decode sizes of a dynamic one; largest
    first.

    Axes double; while that makes more than max_programs, the axis with the most values loses every
    second one.
    """
    rules = caps.shapes
    if not rules.static and caps.graphs == "none":
        return []
    axes = _axes(caps, extent)
    while len(buckets := _combine(caps, extent, axes)) > rules.max_programs:
        name = max(axes, key=lambda n: len(axes[n]))
        if len(axes[name]) <= 1:
            break  # one value each: cannot be coarser
        axes[name] = axes[name][-1::-2][::-1]
    return sorted(buckets, key=_size, reverse=True)


def _size(bucket: Bucket) -> tuple[int, ...]:
    """What orders buckets by the memory that they need."""
    return (bucket.tokens, int(bucket.logits == "all"), bucket.seqs, bucket.kv_blocks)


def _axes(caps: Caps, extent: Extent) -> dict[str, list[int]]:
    multiple = caps.shapes.multiple_of
    seqs_step, kv_step = multiple.get("seqs", 1), multiple.get("kv_blocks", 1)
    axes = {"decode seqs": doubling(1, extent.max_seqs, seqs_step)}
    if caps.shapes.static:
        prefill_seqs = min(caps.phases.max_prefill_seqs or extent.max_seqs, extent.max_seqs)
        axes["prefill seqs"] = doubling(1, prefill_seqs, seqs_step)
        axes["tokens"] = doubling(1, extent.max_tokens, multiple.get("tokens", 1))
        axes["kv"] = doubling(1, extent.max_blocks, kv_step)
    return axes


def _combine(caps: Caps, extent: Extent, axes: dict[str, list[int]]) -> set[Bucket]:
    rules, phases = caps.shapes, caps.phases
    found: set[Bucket] = set()

    def add(phase: Phase, seqs: int, tokens: int, *, scored: bool = False) -> None:
        for kv in axes.get("kv", [0]):
            blocks = {"none": 0, "per_seq": kv, "total": kv * seqs}[rules.kv_axis]
            found.add(Bucket(phase, seqs, tokens, blocks, "all" if scored else "last"))

    for seqs in axes["decode seqs"]:
        q = phases.max_decode_q
        if not (phases.mixed and rules.static):
            add("decode", seqs, seqs * q)
    if rules.static:
        phase: Phase = "mixed" if phases.mixed else "prefill"
        for seqs in axes["prefill seqs"]:
            for tokens in axes["tokens"]:
                add(phase, seqs, seqs * tokens if rules.uniform_q else max(tokens, seqs))
        smallest = min(axes["prefill seqs"])
        add(phase, smallest, smallest * scored_tokens(caps, extent), scored=True)
    return found


@dataclass(frozen=True, slots=True)
class Need:
    """What a launch needs at least; q is the longest row, kv_widest and kv_total count blocks."""

    phase: Phase
    seqs: int
    tokens: int
    q: int
    kv_widest: int
    kv_total: int
    scored: bool = False


def covers(bucket: Bucket, need: Need, caps: Caps) -> bool:
    """Whether the launch fits into the bucket."""
    rules = caps.shapes
    kv = {"none": 0, "per_seq": need.kv_widest, "total": need.kv_total}[rules.kv_axis]
    if bucket.phase != need.phase or (bucket.logits == "all") != need.scored:
        return False
    if rules.uniform_q and bucket.tokens // bucket.seqs < need.q:
        return False
    tokens = need.seqs * need.q if rules.uniform_q else need.tokens
    return bucket.seqs >= need.seqs and bucket.tokens >= tokens and bucket.kv_blocks >= kv


def choose(need: Need, buckets: Sequence[Bucket], caps: Caps) -> Bucket | None:
    """The covering bucket with the least padding; None where a dynamic device has none, so it runs
    uncompiled.

    Raises UncoveredShape on a static device: an error of ours, never a silent compile.
    """
    fitting = [b for b in buckets if covers(b, need, caps)]
    if fitting:
        return min(fitting, key=lambda b: (b.tokens, b.kv_blocks, b.seqs))
    if caps.shapes.static:
        raise UncoveredShape(f"No warmed bucket covers {need}; there are {len(buckets)}.")
    return None


def exact(need: Need, caps: Caps) -> Bucket:
    """A bucket without padding, for dynamic devices."""
    kv = {"none": 0, "per_seq": need.kv_widest, "total": need.kv_total}[caps.shapes.kv_axis]
    tokens = need.seqs * need.q if caps.shapes.uniform_q else need.tokens
    return Bucket(need.phase, need.seqs, tokens, kv, "all" if need.scored else "last")
