"""Few shapes: what varies in number from step to step is filled up to a power of two, so that a
device that compiles for shapes meets a handful of them and not a new one per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def to_power_of_two(items: Sequence[T], filler: T | None = None) -> list[T]:
    """The items, and the last of them (or the filler) again until their number is a power of two;
    none stay none. Writing a cell twice with the same value is writing it once.
    """
    if not items:
        return []
    missing = (1 << (len(items) - 1).bit_length()) - len(items)
    return [*items, *[items[-1] if filler is None else filler] * missing]
