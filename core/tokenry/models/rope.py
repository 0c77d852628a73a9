"""Rotary tables: the angles of every position, computed once.

In: `RopeConfig`, a length. Out: [length, 2, rotary_dim / 2] float32 holding cos and sin, times the
scaling's attention factor. Frequencies that depend on the length of a text ("dynamic", "longrope")
are fixed here by the longest text that may come, since cached keys cannot be turned again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tokenry.errors import ModelLoadError
from tokenry.models.config import RopeConfig


def rope_table(rope: RopeConfig, length: int) -> Tensor:
    """[length, 2, rotary_dim / 2] float32. Raises ModelLoadError for a kind that is not known."""
    if rope.kind not in KINDS:
        raise ModelLoadError(
            f"Rope scaling {rope.kind!r} is not known; known are {', '.join(KINDS)}.",
            mend="remove the scaling from config.json and stay within the original length",
        )
    try:
        frequencies, factor = KINDS[rope.kind](rope, length)
    except KeyError as error:
        raise ModelLoadError(
            f"Rope scaling {rope.kind!r} lacks {error.args[0]!r} in config.json.",
            mend="add it, or download config.json again",
        ) from error
    if frequencies.shape[0] != rope.rotary_dim // 2:
        raise ModelLoadError(
            f"Rope scaling {rope.kind!r} has {frequencies.shape[0]} factors, "
            f"{rope.rotary_dim // 2} are needed.",
            mend="download config.json again",
        )
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1) * factor


def _default(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Su et al., arXiv 2104.09864."""
    return 1.0 / _powers(rope.theta, rope.rotary_dim), 1.0


def _powers(theta: float, dim: int) -> Tensor:
    powers: Tensor = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return powers


def _linear(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Positions shrunk by the factor (kaiokendev 2023)."""
    return _default(rope, length)[0] / rope.factors["factor"], 1.0


def _dynamic(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    """A base that grows with the length (bloc97 and emozilla 2023); the original one up to it."""
    factor, dim = rope.factors["factor"], rope.rotary_dim
    ratio = max(length, rope.max_positions) / rope.max_positions
    theta = rope.theta * (factor * ratio - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / _powers(theta, dim), 1.0


def _llama3(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Long waves shrunk, short ones kept, those between mixed (Llama 3.1's reference code)."""
    own = rope.factors
    factor, low, high = own["factor"], own["low_freq_factor"], own["high_freq_factor"]
    plain = _default(rope, length)[0]
    turns = rope.original * plain / (2 * math.pi)  # of the wave over the original length
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return plain * (keep + (1 - keep) / factor), 1.0


def _yarn(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Peng et al., arXiv 2309.00071; attention factor §3.4, with DeepSeek's mscale if given."""
    own, dim = rope.factors, rope.rotary_dim
    factor = own.get("factor") or rope.max_positions / rope.original

    def at(turns: float) -> float:
        """The dimension whose wave turns so often over the original length."""
        return dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = at(own.get("beta_fast") or 32), at(own.get("beta_slow") or 1)
    if own.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    stretch = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    plain = _default(rope, length)[0]
    scale = own.get("attention_factor")
    if scale is None:
        one, all_dims = own.get("mscale"), own.get("mscale_all_dim")
        scale = _mscale(factor)
        if one and all_dims:
            scale = _mscale(factor, one) / _mscale(factor, all_dims)
    return plain * (1 - stretch) + plain / factor * stretch, float(scale)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    """A factor for each frequency (Ding et al., arXiv 2402.13753), the long ones beyond the
    original length.
    """
    own = rope.factors
    divisors = own["long_factor" if length > rope.original else "short_factor"]
    factor = own.get("factor") or rope.max_positions / rope.original
    scale = own.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original))
    powers = _powers(rope.theta, rope.rotary_dim)
    factors = torch.tensor(divisors, dtype=torch.float32)
    if factors.shape != powers.shape:
        return factors, float(scale)
    return 1.0 / (factors * powers), float(scale)


KINDS: dict[str, Callable[[RopeConfig, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
