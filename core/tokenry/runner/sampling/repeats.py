"""Which tokens would repeat what was said: DRY and n-grams, from the known tokens alone.

In: a row's history. Out: tokens, and what their logits lose. Host work on the tokens of one
request; knows no logits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tokenry.backend.contract import IntArray
from tokenry.runner.sampling.draw import Draw

LOG_LARGEST = math.log(3e38)
"""A penalty stays below the largest float32: longer repeats than that are penalised alike."""


def dry_penalties(draw: Draw) -> dict[int, float]:
    """Token -> what its logit loses, by DRY ("don't repeat yourself", p-e-w, text-generation-webui
    PR 5677).

    If the last n tokens stood somewhere before in the last dry_range tokens (0: all), the token
    that followed them there loses dry_multiplier * dry_base ** (n - dry_allowed_length) where n is
    at least dry_allowed_length. No repeat reaches over a token of dry_breaker_ids, and such a token
    is never penalised.
    """
    p = draw.params
    history = draw.history[-p.dry_range :] if p.dry_range else draw.history
    if not p.dry_multiplier or len(history) < 2 or int(history[-1]) in p.dry_breaker_ids:
        return {}
    breakers = np.array(p.dry_breaker_ids, np.int32)
    longest = min(_longest(p.dry_base, p.dry_multiplier) + p.dry_allowed_length, len(history))
    ends = np.isin(history[-longest:], breakers)[::-1]
    reach = int(ends.argmax()) if ends.any() else longest  # tokens from the last to a breaker
    at = np.flatnonzero(history[:-1] == history[-1])
    at = at[~np.isin(history[at + 1], breakers)]
    best: dict[int, int] = {}
    for length in range(1, reach + 1):
        longer = (at >= length) & (length < reach)
        longer[longer] = history[at[longer] - length] == history[len(history) - 1 - length]
        over = at[~longer]
        best.update(dict.fromkeys(np.unique(history[over + 1]).tolist(), length))
        at = at[longer]
        if not len(at):
            break
    least = p.dry_allowed_length
    return {
        token: p.dry_multiplier * p.dry_base ** (length - least)
        for token, length in best.items()
        if length >= least
    }


def _longest(base: float, multiplier: float) -> int:
    """The largest exponent that matters."""
    if base <= 1:
        return 0
    return max(0, int((LOG_LARGEST - max(0.0, math.log(multiplier))) / math.log(base)))


def repeated_ngrams(history: IntArray, size: int) -> NDArray[np.int32]:
    """Tokens that would end an n-gram of this size which prompt or output hold already, as
    transformers' NoRepeatNGramLogitsProcessor forbids them.
    """
    if len(history) < size:
        return np.zeros(0, np.int32)
    ngrams = np.lib.stride_tricks.sliding_window_view(history, size)
    begun = history[len(history) - size + 1 :]
    tokens: NDArray[np.int32] = np.unique(ngrams[(ngrams[:, :-1] == begun).all(-1), -1])
    return tokens
