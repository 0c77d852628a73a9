"""Checks of single values, each with an error that names the field.

In: a field's name and value. Out: nothing, or the value in the form that it is kept in. Knows no
field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from tokenry.errors import RequestError


def check_whole(name: str, ids: Sequence[object], *, param: str | None = None) -> None:
    """Raises RequestError if one of the ids is no int; `param` if the field has another name."""
    if not set(map(type, ids)) <= {int}:
        wrong = next(i for i in ids if type(i) is not int)
        raise RequestError(
            f"{name} has the token id {wrong!r}, which is a {type(wrong).__name__}, not a whole "
            "number.",
            param=param or name,
            mend="a list of ints; an array's .tolist() is one",
        )


def as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """A list as a tuple, None as an empty one. Raises RequestError for what is no list."""
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list, got {value!r}.", param=name)
    return tuple(value)


def check_range(
    name: str, value: float, low: float, high: float, *, open_low: bool = False, whole: bool = False
) -> None:
    """Raises RequestError unless the value is a finite number in [low, high], or (low, high]."""
    kinds = (int,) if whole else (int, float)
    bad = isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value)
    if bad or value < low or value > high or (open_low and value == low):
        bracket = "(" if open_low else "["
        what = "a whole number in" if whole else "in"
        raise RequestError(
            f"{name} must be {what} {bracket}{low}, {high}], got {value!r}.", param=name
        )
