"""Latencies from time stamps, and tables of them. No clocks here: only arithmetic on what was
measured.

TTFT: request to first token. ITL: from one token to the next. TPOT: mean time per token after the
first. E2EL: request
to last token (the terms of vLLM's `bench serve`). All in seconds; tables show milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One answered request: when it was sent and when each token came, on one clock. error: why it
    failed.
    """

    sent_s: float
    token_s: tuple[float, ...]
    num_prompt: int
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """To the first token."""
        return self.token_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        """To the last token."""
        return self.token_s[-1] - self.sent_s

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Between tokens."""
        return tuple(b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False))

    @property
    def tpot_s(self) -> float | None:
        """Per token after the first; None for a single token."""
        count = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / count if count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean, median and 99th percentile, in seconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(
            mean=sum(values) / len(values), p50=percentile(values, 50), p99=percentile(values, 99)
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default."""
    ranked = sorted(values)
    at = (len(ranked) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (at - low)


def latencies(timelines: Sequence[Timeline]) -> dict[str, Spread]:
    """TTFT, TPOT, ITL and E2EL of the requests that were answered."""
    done = [t for t in timelines if t.error is None and t.token_s]
    kinds = {
        "TTFT": [t.ttft_s for t in done],
        "TPOT": [t.tpot_s for t in done if t.tpot_s is not None],
        "ITL": [gap for t in done for gap in t.itl_s],
        "E2EL": [t.e2el_s for t in done],
    }
    return {name: Spread.of(values) for name, values in kinds.items() if values}


def latency_table(spreads: Mapping[str, Spread]) -> str:
    """A line per kind, milliseconds."""
    lines = [f"{'ms':<6}{'mean':>10}{'p50':>10}{'p99':>10}"]
    for name, spread in spreads.items():
        figures = "".join(f"{1000 * v:>10.1f}" for v in (spread.mean, spread.p50, spread.p99))
        lines.append(f"{name:<6}{figures}")
    return "\n".join(lines)
