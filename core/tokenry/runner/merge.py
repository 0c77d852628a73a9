"""Fewer buckets, least cost first: which two of many boxes are joined next.

In: boxes (sizes along three axes) with weights, a price of each, a limit. Out: at most that many
boxes, of which every one of the first is covered by some. Pure arithmetic on arrays; used to keep a
device's limit of programs and, with the weights of a recorded load, to tune.

The scheme is agglomerative clustering with the join (componentwise maximum) as the centre of two
boxes: joining costs what the launches of both then pay more. Each box remembers its cheapest
partner, so n boxes take O(n^2) steps on arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntTable = NDArray[np.int64]
Floats = NDArray[np.float64]
Work = Callable[[IntTable, IntTable], Floats]
"""(boxes [N, 3], groups [N]) -> work [N]; must not fall when a size grows."""


def merge_down(
    boxes: IntTable, groups: IntTable, weights: Floats, limit: int, work: Work
) -> tuple[IntTable, IntTable]:
    """At most `limit` boxes (but one per group at least), and their groups.

    boxes    [N, 3] sizes.      groups   [N] boxes of different groups are never joined.
    weights  [N] how many launches run in the box.
    """
    pool = _Pool(boxes, groups, weights, work)
    while pool.count > limit and pool.join_cheapest():
        pass
    return pool.boxes[pool.alive], pool.groups[pool.alive]


class _Pool:
    """Boxes still alive; partner and cost of each are kept right after every join."""

    def __init__(self, boxes: IntTable, groups: IntTable, weights: Floats, work: Work) -> None:
        self.boxes, self.groups = boxes.copy(), groups.copy()
        self.alive = np.ones(len(boxes), bool)
        self.count = len(boxes)
        self._weights, self._work = weights.astype(np.float64), work
        self._own = work(self.boxes, self.groups)
        self._partner = np.zeros(len(boxes), np.int64)
        self._cost = np.full(len(boxes), np.inf)
        for i in range(len(boxes)):
            self._find_partner(i)

    def join_cheapest(self) -> bool:
        """Join the two boxes that cost least; False where every group has one box only."""
        i = int(np.argmin(self._cost))
        if not np.isfinite(self._cost[i]):
            return False
        j = int(self._partner[i])
        self.boxes[i] = np.maximum(self.boxes[i], self.boxes[j])
        self._weights[i] += self._weights[j]
        self._own[i] = self._work(self.boxes[i : i + 1], self.groups[i : i + 1])[0]
        self.alive[j], self._cost[j] = False, np.inf
        self.count -= 1
        orphans = np.flatnonzero(self.alive & np.isin(self._partner, (i, j)))
        costs = self._find_partner(i)
        better = self.alive & (costs < self._cost)
        better[i] = False
        self._cost[better], self._partner[better] = costs[better], i
        for k in orphans:
            if k != i:
                self._find_partner(int(k))
        return True

    def _find_partner(self, i: int) -> Floats:
        """Note the cheapest partner of box i; the cost of joining it with each other box."""
        joined = self._work(np.maximum(self.boxes, self.boxes[i]), self.groups)
        more: NDArray[Any] = self._weights[i] * (joined - self._own[i])
        more = more + self._weights * (joined - self._own)
        more[~self.alive | (self.groups != self.groups[i])] = np.inf
        more[i] = np.inf
        self._partner[i] = int(np.argmin(more))
        self._cost[i] = more[self._partner[i]]
        return more
