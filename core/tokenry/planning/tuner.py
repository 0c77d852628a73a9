"""Buckets for a recorded load, within a budget of programs.

In: how often each need occurred, the device's Caps, the engine's extent. Out: buckets that cover
every step (not only the recorded ones) with little padding on this load. Knows no device and no
file.

Method: every distinct need is a box with its count as weight; beside them stand the boxes of the
default grid with a small weight, so that what did not occur in the sample is padded by steps and
not to the largest shape at once. The boxes are joined, cheapest first (runner/merge.py), down to
the budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from tokenry.backend.contract import Bucket, Caps
from tokenry.errors import ConfigError
from tokenry.runner.axes import round_up
from tokenry.runner.bucket_grid import (
    MOST_CELLS,
    Cell,
    bucket_of,
    cell_of,
    coarsen,
    grid,
    prior,
    size,
    work_of,
)
from tokenry.runner.buckets import BucketSettings, Need, exact
from tokenry.runner.shapes import Extent

PRIOR = 0.02
"""Weight of the default grid, as a share of the load's work."""


def tune(
    needs: Mapping[Need, int], caps: Caps, extent: Extent, settings: BucketSettings
) -> list[Bucket]:
    """At most `settings.max_programs` buckets (and no more than the device holds), largest first.

    Raises ConfigError on devices whose shapes are free, and where the limit is below one program
    per kind.
    """
    if not caps.shapes.static:
        raise ConfigError(
            "This device's programs have no fixed shapes that a load could choose.",
            mend="--backend with static shapes, see `tokenry devices --all`",
        )
    default = BucketSettings(block_price=settings.block_price)
    ladder = grid(caps, extent, default)
    occurred = _occurred(needs, caps, MOST_CELLS)
    cells = [*occurred, *ladder]
    counts = np.array(list(occurred.values()), np.float64)
    weights = prior(ladder, caps, settings.block_price)
    load_work = counts @ work_of(list(occurred), caps, settings.block_price) if occurred else 1.0
    weights *= PRIOR * load_work / (weights @ work_of(ladder, caps, settings.block_price))
    limit = min(caps.shapes.max_programs, settings.max_programs or caps.shapes.max_programs)
    chosen = coarsen(cells, np.concatenate([counts, weights]), limit, caps, settings)
    return sorted({bucket_of(cell, caps) for cell in chosen}, key=size, reverse=True)


def _occurred(needs: Mapping[Need, int], caps: Caps, most: int) -> Counter[Cell]:
    """The smallest cell of each need with its count. Where these are more than `most`, sizes are
    rounded up, first by 1 %, then by more.
    """
    ratio = 1.0
    while True:
        found: Counter[Cell] = Counter()
        for need, count in needs.items():
            found[_smallest(need, caps, ratio)] += count
        if len(found) <= most:
            return found
        ratio += 0.01


def _smallest(need: Need, caps: Caps, ratio: float) -> Cell:
    """The cell without padding, but for the device's multiples and the ratio's steps."""
    cell = cell_of(exact(need, caps), caps)
    multiple = caps.shapes.multiple_of
    fixed = cell.kind.phase == "decode"
    return Cell(
        cell.kind,
        round_up(_step_up(cell.seqs, ratio), multiple.get("seqs", 1)),
        cell.width if fixed else round_up(_step_up(cell.width, ratio), multiple.get("tokens", 1)),
        round_up(_step_up(cell.kv_blocks, ratio), multiple.get("kv_blocks", 1)),
    )


def _step_up(value: int, ratio: float) -> int:
    """The next of 1, 1 * ratio, 1 * ratio^2, ..."""
    if ratio == 1.0 or value < 2:
        return value
    return int(np.ceil(ratio ** np.ceil(np.log(value) / np.log(ratio)) - 1e-9))
