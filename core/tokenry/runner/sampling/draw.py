"""What a row brings that draws a token, and its uniform number.

In: a request's parameters, seed and known tokens. Out: `Draw`; numbers in [0, 1) that are a
function of (seed, position) alone. Knows no logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenry.backend.contract import IntArray
from tokenry.params import SamplingParams
from tokenry.plan import Mask
from tokenry.runner.sampling.marks import mix
from tokenry.runner.sampling.processors import LogitsProcessor


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """One row that draws a token: token number `position` of the request.

    plain  its parameters alone change no logit, as was found when the request came.
    mask   what its grammar lets be drawn; made while the model runs.
    mu     mirostat's bound after the last token, None before the first.
    """

    params: SamplingParams
    seed: int
    position: int
    num_prompt: int
    history: IntArray
    plain: bool
    processor: LogitsProcessor | None = None
    mask: Mask | None = None
    mu: float | None = None


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float32]:
    """[n] float32 in [0, 1), a function of (seed, position): two rounds of SplitMix64."""
    state = np.array([s & (2**64 - 1) for s in seeds], np.uint64)
    mixed = mix(mix(state) + np.array(positions, np.uint64))
    return (mixed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
