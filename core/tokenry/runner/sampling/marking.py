"""Watermarks put into logits: a bonus for green tokens, or Gumbel noise that a key decides.

In: logits of marked rows. Out: the same, changed in place. Source of the schemes: see marks.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenry.runner.sampling.draw import Draw
from tokenry.runner.sampling.marks import (
    context_hash,
    context_of,
    green,
    numbers,
    seen_before,
)


def add_green(out: Tensor, draws: Sequence[tuple[int, Draw]]) -> None:
    """The green-list scheme: delta more for every green token of these rows, in place."""
    tokens = np.arange(out.shape[-1])
    for i, draw in draws:
        mark = draw.params.watermark
        if mark is None or mark.scheme != "kgw":
            continue
        context = context_of(draw.history, mark.context)
        if context is not None:
            chosen = green(context_hash(mark.key, context), tokens, mark.gamma)
            bonus = torch.from_numpy(chosen.astype(np.float32) * np.float32(mark.delta))
            out[i] += bonus.to(out.device, non_blocking=True)


def by_gumbel(draw: Draw) -> bool:
    """Whether the keyed numbers draw this token; where the same context drew one before, or there
    are too few tokens, the request's own number does.
    """
    mark = draw.params.watermark
    if mark is None or mark.scheme != "gumbel" or draw.params.greedy:
        return False
    if len(draw.history) < mark.context:
        return False
    return not seen_before(draw.history, draw.num_prompt, mark.context)


def add_gumbel(out: Tensor, draws: Sequence[tuple[int, Draw]]) -> None:
    """Aaronson's scheme: the largest of these logits is the token with the largest r ** (1 / p), p
    the distribution that the row would draw from; in place.
    """
    if not draws:
        return
    tokens = np.arange(out.shape[-1])
    for i, draw in draws:
        mark = draw.params.watermark
        context = None if mark is None else context_of(draw.history, mark.context)
        if mark is None or context is None:
            continue
        r = numbers(context_hash(mark.key, context), tokens)
        noise = torch.from_numpy((-np.log(-np.log(r))).astype(np.float32))
        shifted = (out[i] - out[i].amax()) / draw.params.temperature
        out[i] = shifted + noise.to(out.device, non_blocking=True)
