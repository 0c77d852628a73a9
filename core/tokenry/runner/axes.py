"""The values that one axis of the buckets has: exponential, linear or padding-aware.

In: an AxisRule and the largest value that can occur. Out: rising values, the last one not below the
largest. Pure arithmetic, knows neither devices nor steps.

Sources of the schemes: the bucketing of a fork of vLLM for a static device (exponential, linear,
padding-aware with min, step, max, pad_max, pad_percent). Here every strategy heeds every setting,
and the last value always covers what can come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenry.errors import ConfigError

Strategy = Literal["exponential", "linear", "padding-aware"]
STRATEGIES: tuple[Strategy, ...] = ("exponential", "linear", "padding-aware")


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisRule:
    """How the values of one axis are made.

    min          the first value.
    step         linear: distance of the values; exponential: they are multiples of it;
                 padding-aware: the candidates. None: what the strategy finds right (exponential:
                 the device's multiple).
    max          the regular series ends here; one more value covers what is larger. None: no such
                 end.
    pad_max      padding-aware: most padding between two values. None: a quarter of the largest.
    pad_percent  padding-aware: most padding between two values, in percent of the larger, 0 to 50.
    values       these and no others (plus the largest).
    """

    min: int = 1
    step: int | None = None
    max: int | None = None
    pad_max: int | None = None
    pad_percent: int = 25
    values: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value}, it must be at least 1"
            for name in ("min", "step", "max", "pad_max")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.max is not None and self.max < self.min:
            wrong.append(f"max ({self.max}) is below min ({self.min})")
        if not 0 <= self.pad_percent <= 50:
            wrong.append(f"pad_percent is {self.pad_percent}, it must lie in 0..50")
        if any(value < 1 for value in self.values):
            wrong.append(f"values must be at least 1: {list(self.values)}")
        if wrong:
            raise ConfigError(
                f"A bucket axis: {'; '.join(wrong)}.", mend="min:step:max, e.g. 1:2:64"
            )


def axis_values(strategy: Strategy, rule: AxisRule, largest: int, multiple: int = 1) -> list[int]:
    """Rising multiples of `multiple`; the last is `largest` rounded up, the others are smaller."""
    top = round_up(largest, multiple)
    end = min(top, rule.max) if rule.max is not None else top
    step = multiple if rule.step is None else round_up(rule.step, multiple)
    if rule.values:
        found = set(rule.values)
    elif strategy == "exponential":
        found = {round_up(value, step) for value in _doubled(rule.min, end)} | {end}
    elif strategy == "linear":
        coarse = step if rule.step is not None else max(step, round_up(-(-end // 16), multiple))
        found = _doubled(rule.min, min(coarse, end)) | {end}
        found.update(range(round_up(rule.min, coarse), end, coarse))
    else:
        found = _padding_aware(rule, step, end)
    rounded = {round_up(value, multiple) for value in found}
    return sorted({value for value in rounded if value < top} | {top})


def round_up(value: int, step: int) -> int:
    """The next multiple of step."""
    return -(-value // step) * step


def _doubled(low: int, end: int) -> set[int]:
    """low, then doubled, while below end."""
    return {low << i for i in range(end.bit_length()) if low << i < end}


def _padding_aware(rule: AxisRule, step: int, end: int) -> set[int]:
    """min, doubled while below step; then those multiples of step that the limits of padding need.

    A candidate stays if with the next one in its place the padding above the last kept value would
    be more than pad_percent of that next one, or more than pad_max.
    """
    most = rule.pad_max if rule.pad_max is not None else max(1, -(-end // 4))
    found = _doubled(rule.min, min(step, end)) | {end, min(rule.min, end)}
    last = max(value for value in found if value < max(step, rule.min + 1))
    for value in range(round_up(last + 1, step), end, step):
        following = min(value + step, end)
        padding = following - last - 1
        if 100 * padding > rule.pad_percent * following or padding > most:
            found.add(value)
            last = value
    return found
