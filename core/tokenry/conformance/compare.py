"""Whether two arrays are the same but for rounding, and what to say when they are not.

Tolerances are per dtype: an element may differ by atol * (scale of the expected values) + rtol *
its own, and the normalised mean square error has a bound of its own, because a kernel that is
slightly wrong everywhere passes element by element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Tolerance:
    """atol is a share of the largest expected value; nmse bounds |got - want|^2 / |want|^2."""

    atol: float
    rtol: float
    nmse: float


TOLERANCES = {
    "float32": Tolerance(2e-4, 2e-4, 1e-7),
    "float16": Tolerance(4e-3, 4e-3, 2e-5),
    "bfloat16": Tolerance(2.5e-2, 2.5e-2, 5e-4),
}
"""One product of depth up to a few hundred, accumulated in float32, rounded once or twice."""
MODEL_TOLERANCES = {
    "float32": Tolerance(1e-3, 1e-3, 1e-6),
    "float16": Tolerance(3e-2, 3e-2, 1e-3),
    "bfloat16": Tolerance(2e-1, 2e-1, 2e-2),
}
"""Logits of a model of two layers, whose roundings add up."""


def difference(
    got: NDArray[Any], want: NDArray[Any], dtype: str, *, whole_model: bool = False
) -> str | None:
    """None if equal within the tolerance of the dtype, else one line with the figures."""
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, expected {list(want.shape)}"
    if not want.size:
        return None
    limit = (MODEL_TOLERANCES if whole_model else TOLERANCES)[dtype]
    a, b = got.astype(np.float64), want.astype(np.float64)
    broken = ~np.isfinite(a)
    if broken.any():
        at = tuple(int(i) for i in np.argwhere(broken)[0])
        return f"{int(broken.sum())} of {a.size} values are not finite, the first at {at}"
    error = np.abs(a - b)
    scale = max(float(np.abs(b).max()), 1e-6)
    allowed = limit.atol * scale + limit.rtol * np.abs(b)
    nmse = float((error**2).sum() / max(float((b**2).sum()), 1e-12))
    if (error <= allowed).all() and nmse <= limit.nmse:
        return None
    at = tuple(int(i) for i in np.unravel_index(int((error - allowed).argmax()), error.shape))
    return (
        f"{dtype} {list(got.shape)}: error {error[at]:.3g} at {at} (got {a[at]:.5g}, expected "
        f"{b[at]:.5g}), allowed {allowed[at]:.3g}; {int((error > allowed).sum())} of {error.size} "
        f"beyond; NMSE {nmse:.2g}, allowed {limit.nmse:.2g}"
    )


def same_bits(got: NDArray[Any], want: NDArray[Any]) -> str | None:
    """None if equal bit for bit, else one line with the figures."""
    if got.shape != want.shape:
        return f"shape {list(got.shape)}, expected {list(want.shape)}"
    differs = got != want
    if not differs.any():
        return None
    at = tuple(int(i) for i in np.argwhere(differs)[0])
    gap = np.abs(got.astype(np.float64) - want.astype(np.float64)).max()
    return (
        f"{int(differs.sum())} of {got.size} values differ in their bits, by up to {gap:.3g}; the "
        f"first at {at}: {got[at]!r}, expected {want[at]!r}"
    )
