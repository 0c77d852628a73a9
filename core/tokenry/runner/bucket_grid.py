"""Which buckets a device gets: a grid over its axes without the cells that no step reaches, then
fewer of them, least cost first, until the device can hold the programs.

In: Caps (which axes there are), Extent (the largest step), BucketSettings. Out: buckets, largest
first, of which one covers every launch that `shapes.split` can make. No tensors, no device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tokenry.backend.contract import Bucket, Caps, Phase
from tokenry.errors import ConfigError
from tokenry.runner.axes import AxisRule, axis_values, round_up
from tokenry.runner.buckets import BucketSettings
from tokenry.runner.merge import Floats, IntTable, merge_down
from tokenry.runner.shapes import Extent, scored_tokens

AXES = {
    "prefill.seqs": "prompts of one program",
    "prefill.tokens": "tokens computed (of a row where rows are padded to one length)",
    "prefill.kv_blocks": "KV blocks, context and new tokens (as the device counts them)",
    "decode.seqs": "requests of one program",
    "decode.kv_blocks": "KV blocks (as the device counts them)",
}
"""Axis names of the settings. Devices that mix prompts and answers have the prefill axes only."""

MOST_CELLS = 2048
"""Cells that coarsening begins with at most; a finer grid first loses every second value."""
LAUNCH_WORK = 8.0
"""Work of launching any program, in tokens: rounding 1 row up to 2 is nearly free."""
SCORED_WEIGHT = 0.01
"""How likely prompt log-probabilities are beside other launches, when nothing is known."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Programs that may stand in for each other."""

    phase: Phase
    scored: bool

    @property
    def axes(self) -> str:
        """First half of its axes' names."""
        return "decode" if self.phase == "decode" else "prefill"


@dataclass(frozen=True, slots=True)
class Cell:
    """A bucket as three sizes that grow on their own. width: tokens of a row (prefill on devices
    that do not pad rows: of the launch).
    """

    kind: Kind
    seqs: int
    width: int
    kv_blocks: int


def make_buckets(
    caps: Caps, extent: Extent, settings: BucketSettings | None = None
) -> list[Bucket]:
    """Every bucket of a static device; of a dynamic one the decode sizes and, where it wants them,
    small mixed steps. Largest first.

    Raises ConfigError where the limit of programs leaves less than one per kind.
    """
    settings = settings or BucketSettings()
    if not caps.shapes.static and caps.graphs == "none":
        return []
    limit = min(caps.shapes.max_programs, settings.max_programs or caps.shapes.max_programs)
    needed = len(kinds(caps))
    if limit < needed:
        raise ConfigError(
            f"{limit} programs are too few: this device needs {needed} kinds of them "
            f"({', '.join(_name(kind) for kind in kinds(caps))}).",
            mend=f"--max-programs {needed} or more",
        )
    cells = grid(caps, extent, settings)
    if settings.buckets:
        cells = _completed([_fitted(b, cells, caps) for b in settings.buckets], cells)
    cells = coarsen(cells, prior(cells, caps, settings.block_price), limit, caps, settings)
    return sorted({bucket_of(cell, caps) for cell in cells}, key=size, reverse=True)


def deviations(caps: Caps, settings: BucketSettings, buckets: Sequence[Bucket]) -> list[str]:
    """What became of the settings otherwise than they say, as lines for the start-up log."""
    found = []
    most, holds = settings.max_programs, caps.shapes.max_programs
    if most is not None and most > holds and buckets:
        found.append(f"max_programs {most}: the device holds {holds}")
    if settings.buckets and buckets:
        wanted, made = set(settings.buckets), set(buckets)
        if wanted != made:
            found.append(
                f"of the {len(wanted)} buckets of the file {len(wanted & made)} are used as they "
                f"are, {len(made - wanted)} others cover what is left with these limits"
            )
    return found


def size(bucket: Bucket) -> tuple[int, ...]:
    """What orders buckets by the memory that they need."""
    return (bucket.tokens, int(bucket.logits == "all"), bucket.seqs, bucket.kv_blocks)


def maxima(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Of each kind the buckets that no other one covers: whoever has run these, has seen the
    largest step.
    """

    def inside(a: Bucket, b: Bucket) -> bool:
        same = a != b and a.phase == b.phase and a.logits == b.logits
        wide = a.tokens // a.seqs <= b.tokens // b.seqs
        return (
            same
            and wide
            and a.tokens <= b.tokens
            and a.seqs <= b.seqs <= b.tokens
            and (a.kv_blocks <= b.kv_blocks)
        )

    return [a for a in buckets if not any(inside(a, b) for b in buckets)]


def kinds(caps: Caps) -> list[Kind]:
    """Kinds of programs that the device has."""
    phases = caps.phases
    if not caps.shapes.static:
        mixed = [Kind("mixed", False)] if caps.shapes.mixed_tokens and phases.mixed else []
        return [*mixed, Kind("decode", False)]
    if phases.mixed:
        return [Kind("mixed", False), Kind("mixed", True)]
    return [Kind("prefill", False), Kind("prefill", True), Kind("decode", False)]


# ---- the grid --------------------------------------------------------------------------------


def grid(caps: Caps, extent: Extent, settings: BucketSettings) -> list[Cell]:
    """A cell for every combination of axis values that some launch has as its cheapest cover."""
    while True:
        cells = [c for kind in kinds(caps) for c in _kind_cells(kind, caps, extent, settings)]
        if len(cells) <= MOST_CELLS:
            return cells
        settings = _coarser(caps, extent, settings)


def _coarser(caps: Caps, extent: Extent, settings: BucketSettings) -> BucketSettings:
    """Settings in which the longest axis has half of its values."""
    values = {name: _values(name, caps, extent, settings) for name in AXES}
    longest = max(values, key=lambda name: len(values[name]))
    half = AxisRule(values=tuple(values[longest][-1::-2]))
    return BucketSettings(
        strategy=settings.strategy,
        axes={**settings.axes, longest: half},
        block_price=settings.block_price,
    )


def _kind_cells(kind: Kind, caps: Caps, extent: Extent, settings: BucketSettings) -> Iterator[Cell]:
    rows = _values(f"{kind.axes}.seqs", caps, extent, settings)
    if kind.phase == "decode":
        widths = [caps.phases.max_decode_q]
    elif kind.scored:
        rows, widths = rows[:1], [scored_tokens(caps, extent)]
    else:
        widths = _values("prefill.tokens", caps, extent, settings)
        if not caps.shapes.static:
            rows = rows[::-2][::-1]  # an empty row costs little; the largest stays
    blocks = _values(f"{kind.axes}.kv_blocks", caps, extent, settings)
    for fewer, seqs in zip([0, *rows], rows, strict=False):
        for less, width in zip([0, *widths], widths, strict=False):
            if not _reached(kind, fewer + 1, less + 1, caps, extent):
                continue
            low, high = _kv_range(kind, (fewer + 1, seqs), (less + 1, width), caps, extent)
            if low > high:
                continue
            top = round_up(high, caps.shapes.multiple_of.get("kv_blocks", 1))
            for kv in sorted({min(v, top) for v in blocks if v >= low} | {min(top, blocks[-1])}):
                yield Cell(kind, seqs, width, kv)


def _values(name: str, caps: Caps, extent: Extent, settings: BucketSettings) -> list[int]:
    """Values of one axis; [0] where the device has no such axis."""
    rules, phases = caps.shapes, caps.phases
    phase, axis = name.split(".")
    seqs = extent.max_seqs
    if phase == "prefill" and not rules.static:
        seqs = min(seqs, max(1, rules.mixed_tokens))
    if phase == "prefill" and phases.max_prefill_seqs is not None and not phases.mixed:
        seqs = min(seqs, phases.max_prefill_seqs)
    if axis == "kv_blocks" and (rules.kv_axis == "none" or not rules.static):
        return [0]
    largest = {
        "seqs": seqs,
        "tokens": extent.max_tokens,
        "kv_blocks": extent.batch_blocks(seqs if rules.kv_axis == "total" else 1),
    }[axis]
    if axis == "tokens" and not rules.static:
        largest = min(largest, max(1, rules.mixed_tokens))
    if axis == "tokens" and rules.uniform_q and extent.block_size is not None:
        largest = min(largest, extent.max_blocks * extent.block_size)
    rule = settings.axes.get(name, AxisRule())
    return axis_values(settings.strategy, rule, largest, rules.multiple_of.get(axis, 1))


def _reached(kind: Kind, seqs: int, width: int, caps: Caps, extent: Extent) -> bool:
    """Whether a launch can have that many rows and that width at once."""
    if kind.phase == "decode" or kind.scored:
        return True
    if not caps.shapes.uniform_q:
        return True  # rows of one token widen the launch
    if kind.phase == "mixed":
        return width + seqs - 1 <= extent.max_tokens
    return seqs * width <= extent.max_tokens


def _kv_range(
    kind: Kind, seqs: tuple[int, int], width: tuple[int, int], caps: Caps, extent: Extent
) -> tuple[int, int]:
    """Fewest and most KV blocks of launches with seqs and width in these ranges."""
    axis, bs = caps.shapes.kv_axis, extent.block_size
    if axis == "none" or not caps.shapes.static:
        return 0, 0
    rows = seqs[1] if axis == "total" else 1
    high = extent.batch_blocks(rows)
    others = seqs[0] - 1 if axis == "total" else 0
    low = 1 + others
    if bs is None or kind.phase == "decode":
        return low, high
    if caps.shapes.uniform_q or kind.scored:
        low = -(-width[0] // bs) + others
        fresh = -(-width[1] // bs) * rows
    else:
        longest = width[0] if axis == "total" else -(-width[0] // seqs[1])
        low = max(low, -(-longest // bs))
        fresh = -(-width[1] // bs) + rows - 1
    if not caps.phases.chunked and kind.phase == "prefill":
        high = min(high, fresh)  # no context
    return low, high


def bucket_of(cell: Cell, caps: Caps) -> Bucket:
    """The cell as the contract names it."""
    per_row = caps.shapes.uniform_q or cell.kind.phase == "decode" or cell.kind.scored
    tokens = cell.seqs * cell.width if per_row else max(cell.width, cell.seqs)
    logits = "all" if cell.kind.scored else "last"
    return Bucket(cell.kind.phase, cell.seqs, tokens, cell.kv_blocks, logits)  # type: ignore[arg-type]  # logits is one of both


def cell_of(bucket: Bucket, caps: Caps) -> Cell:
    """The bucket as a cell."""
    kind = Kind(bucket.phase, bucket.logits == "all")
    per_row = caps.shapes.uniform_q or bucket.phase == "decode" or kind.scored
    width = bucket.tokens // bucket.seqs if per_row else bucket.tokens
    return Cell(kind, bucket.seqs, width, bucket.kv_blocks)


# ---- fewer -----------------------------------------------------------------------------------


def coarsen(
    cells: Sequence[Cell],
    weights: Floats,
    limit: int,
    caps: Caps,
    settings: BucketSettings,
) -> list[Cell]:
    """At most `limit` cells that cover what the given ones cover; weights: launches of each."""
    if len(cells) <= limit:
        return list(cells)
    known = list(dict.fromkeys(cell.kind for cell in cells))
    groups = np.array([known.index(cell.kind) for cell in cells], np.int64)
    boxes, groups = merge_down(
        _boxes(cells),
        groups,
        weights,
        limit,
        lambda boxes, groups: _work(boxes, groups, known, caps, settings.block_price),
    )
    return [
        Cell(known[group], *row) for row, group in zip(boxes.tolist(), groups.tolist(), strict=True)
    ]


def prior(cells: Sequence[Cell], caps: Caps, block_price: float) -> Floats:
    """Weights where no load is known: what padding adds to a cell counts in proportion to the
    cell's own work, and all cells are as likely (those of prompt log-probabilities less).
    """
    rare = np.array([SCORED_WEIGHT if cell.kind.scored else 1.0 for cell in cells])
    return rare / (work_of(cells, caps, block_price) + LAUNCH_WORK)


def work_of(cells: Sequence[Cell], caps: Caps, block_price: float) -> Floats:
    """`buckets.work` of each cell."""
    known = list(dict.fromkeys(cell.kind for cell in cells))
    groups = np.array([known.index(cell.kind) for cell in cells], np.int64)
    return _work(_boxes(cells), groups, known, caps, block_price)


def _boxes(cells: Sequence[Cell]) -> IntTable:
    return np.array([(c.seqs, c.width, c.kv_blocks) for c in cells], np.int64).reshape(-1, 3)


def _work(
    boxes: IntTable, groups: IntTable, known: Sequence[Kind], caps: Caps, block_price: float
) -> Floats:
    """`buckets.work` of boxes [N, 3] of the known kinds."""
    seqs, width, kv = boxes[:, 0], boxes[:, 1], boxes[:, 2]
    per_row = np.array([caps.shapes.uniform_q or k.phase == "decode" or k.scored for k in known])
    tokens = np.where(per_row[groups], seqs * width, np.maximum(width, seqs))
    blocks = kv * seqs if caps.shapes.kv_axis == "per_seq" else kv
    return np.asarray(tokens + block_price * blocks, np.float64)


# ---- buckets from a file ---------------------------------------------------------------------


def _fitted(bucket: Bucket, cells: Sequence[Cell], caps: Caps) -> Cell:
    """The bucket on this device: sizes rounded to its multiples, no larger than can come. Raises
    ConfigError for a kind that the device does not have.
    """
    cell = cell_of(bucket, caps)
    same = [c for c in cells if c.kind == cell.kind]
    if not same:
        raise ConfigError(
            f"{bucket} is of no kind that this device has "
            f"({', '.join(_name(kind) for kind in kinds(caps))}): the bucket file is another's.",
            mend="tokenry buckets MODEL --tune --output FILE, for this backend",
        )
    multiple = caps.shapes.multiple_of

    def fit(value: int, axis: str, largest: int) -> int:
        return min(round_up(value, multiple.get(axis, 1)), largest)

    return Cell(
        cell.kind,
        fit(cell.seqs, "seqs", max(c.seqs for c in same)),
        fit(cell.width, "tokens", max(c.width for c in same)),
        fit(cell.kv_blocks, "kv_blocks", max(c.kv_blocks for c in same)),
    )


def _completed(chosen: Sequence[Cell], cells: Sequence[Cell]) -> list[Cell]:
    """The chosen cells and those largest ones of the grid that none of them covers."""

    def inside(a: Cell, b: Cell) -> bool:
        return (
            a.kind == b.kind
            and a.seqs <= b.seqs
            and a.width <= b.width
            and a.kv_blocks <= b.kv_blocks
        )

    missing = [c for c in cells if not any(inside(c, b) for b in chosen)]
    tops = [c for c in missing if not any(c != b and inside(c, b) for b in missing)]
    return list(dict.fromkeys([*chosen, *tops]))


def _name(kind: Kind) -> str:
    return "prompt log-probabilities" if kind.scored else kind.phase
