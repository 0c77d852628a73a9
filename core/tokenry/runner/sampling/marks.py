"""Watermarks: numbers that a key and the last tokens decide, for the sampler and for the detector.

In: a key, the tokens before, the vocabulary's size or a token. Out: which tokens are green (the
green-list scheme, Kirchenbauer et al., arXiv 2301.10226) or a number in (0, 1) per token (Gumbel,
Aaronson 2022). Whole-number arithmetic of SplitMix64 only, so every device and every version draws
the same. A token is green by its own hash and not by a shuffled list: the detector asks for one
token at a time. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
_WORD = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)


def mix(z: Hashes) -> Hashes:
    """One round of SplitMix64 (Steele et al., OOPSLA 2014), [n]: arrays overflow silently."""
    z = z + _GOLDEN
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    return z ^ (z >> _31)


def context_hash(key: int, context: Sequence[int]) -> Hashes:
    """[1] uint64 of the key and the last tokens, in their order."""
    state = mix(np.array([key & _WORD], np.uint64))
    for token in context:
        state = mix(state ^ np.uint64(int(token)))
    return state


def token_hashes(state: Hashes, tokens: NDArray[np.integer]) -> Hashes:
    """[n] uint64, one per token, after the context with this hash."""
    return mix(state ^ (tokens.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def green(state: Hashes, tokens: NDArray[np.integer], gamma: float) -> NDArray[np.bool_]:
    """[n]: which of the tokens are green; about gamma of all are."""
    return token_hashes(state, tokens) < np.uint64(min(_WORD, int(gamma * 2.0**64)))


def numbers(state: Hashes, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
    """[n] float64 in (0, 1): the r of r ** (1 / p)."""
    return ((token_hashes(state, tokens) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def context_of(tokens: NDArray[np.int32], width: int) -> tuple[int, ...] | None:
    """The last `width` tokens, None where there are not so many."""
    return tuple(tokens[len(tokens) - width :].tolist()) if len(tokens) >= width else None


def seen_before(tokens: NDArray[np.int32], num_prompt: int, width: int) -> bool:
    """Whether an earlier output token was drawn after the same context: its numbers are used up, a
    second draw by them would only repeat (Hu et al., arXiv 2310.10669, skip it likewise).
    """
    first = max(num_prompt, width)
    begin = len(tokens) - width
    if begin < 0 or len(tokens) <= first:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(tokens[first - width :], width)[:-1]
    return bool((windows == tokens[begin:]).all(-1).any())
