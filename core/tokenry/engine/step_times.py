"""How long a step takes, learned while the engine runs.

In: tokens, requests and seconds of steps. Out: predictions. The model is linear, seconds = a + b *
tokens + c * requests, fitted by least squares over the last few hundred steps (older ones fade).
Reads no clock.
"""

from __future__ import annotations

import math

_FADE = 0.995
_EVERY = 8
"""Observations between two fits."""
_OUTLIER = 5.0
"""A step that took so many times longer than predicted was no common step: a pause, a compile."""


class StepTimes:
    """Coefficients are never negative: more work never takes less time. Before the first step all
    predictions are 0, so that nothing is refused for a guess.
    """

    def __init__(self) -> None:
        self.base_s = self.token_s = self.request_s = 0.0
        self.mean_s = 0.0
        self._count = 0
        # sums of products of (1, tokens, requests, seconds), faded
        self._sums = [[0.0] * 4 for _ in range(4)]

    def seconds(self, num_tokens: float, num_requests: float) -> float:
        """Predicted seconds of a step."""
        return self.base_s + self.token_s * num_tokens + self.request_s * num_requests

    def tokens_within(self, seconds: float, num_requests: int) -> int:
        """Most tokens of a step of that length, 0 if even an empty one is longer."""
        left = seconds - self.base_s - self.request_s * num_requests
        if left <= 0:
            return 0
        return 2**31 if self.token_s == 0 else min(2**31, int(left / self.token_s))

    def observe(self, num_tokens: int, num_requests: int, seconds: float) -> None:
        """A step of that size took so long."""
        if self._count > _EVERY:
            most = _OUTLIER * self.seconds(num_tokens, num_requests)
            seconds = min(seconds, most) if most > 0 else seconds
        self.mean_s += (seconds - self.mean_s) / min(self._count + 1, 20)
        values = (1.0, float(num_tokens), float(num_requests), seconds)
        for row, x in zip(self._sums, values, strict=True):
            for j, y in enumerate(values):
                row[j] = row[j] * _FADE + x * y
        self._count += 1
        if self._count <= 3 or self._count % _EVERY == 0:
            self._fit()

    def _fit(self) -> None:
        """Least squares; a coefficient that comes out negative is left out and the others are
        fitted anew.
        """
        used = [0, 1, 2]
        found = self._solve(used)
        while used and (found is None or min(found) < 0):
            drop = 2 if found is None else found.index(min(found))
            used.pop(min(drop, len(used) - 1))
            found = self._solve(used)
        values = dict(zip(used, found or (), strict=True))
        self.base_s, self.token_s, self.request_s = (values.get(i, 0.0) for i in range(3))

    def _solve(self, used: list[int]) -> list[float] | None:
        """Gauss' elimination of the normal equations of these columns; None where the steps so far
        do not tell them apart.
        """
        rows = [[self._sums[i][j] for j in used] + [self._sums[i][3]] for i in used]
        size = len(rows)
        for i in range(size):
            pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
            if abs(rows[pivot][i]) <= 1e-9 * max(1.0, self._sums[used[i]][used[i]]):
                return None
            rows[i], rows[pivot] = rows[pivot], rows[i]
            for r in range(size):
                if r != i:
                    factor = rows[r][i] / rows[i][i]
                    rows[r] = [x - factor * y for x, y in zip(rows[r], rows[i], strict=True)]
        result = [rows[i][size] / rows[i][i] for i in range(size)]
        return result if all(map(math.isfinite, result)) else None
