"""What follows the logits of a step that no request is behind: in probing and in warm-up.

In: logits, the sampler, the backend. Out: nothing; the sampler has run in every way that it can be
asked, the scores of a prompt were computed, and all went to the host, as in a real step.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tokenry.backend.base import Backend, StepBatch
from tokenry.params import SamplingParams
from tokenry.runner.sampler import Sampler
from tokenry.runner.sampling.draw import Draw
from tokenry.runner.sampling.rules import is_plain
from tokenry.runner.sampling.scores import ROWS_AT_ONCE, score

WAYS_TO_DRAW = (
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(top_k=40, top_p=0.95, min_p=0.01),
)
"""What a batch of draws can ask of the `sample` op; the last needs the most memory."""
MOST_LOGPROBS = 20
"""Alternatives that a scored step is tried with."""


def try_draws(sampler: Sampler, backend: Backend, logits: Tensor, batch: StepBatch) -> None:
    """Draw from logits [R, vocab] of the batch; with all logits, score its tokens first (on the
    host, where scores are made of some rows at a time, of two such parts: more need no more).
    """
    if batch.bucket.logits == "all":
        rows = len(logits) if logits.device.type != "cpu" else 2 * ROWS_AT_ONCE
        backend.fetch(score(logits[:rows], batch.token_ids[:rows], MOST_LOGPROBS).tensors)()
        logits = logits[:1]  # the one row that a scored launch draws from
    history = np.zeros(1, np.int32)
    for params in WAYS_TO_DRAW:
        draw = Draw(
            params=params, seed=0, position=1, num_prompt=1, history=history, plain=is_plain(params)
        )
        sampled = sampler(logits, [draw] * len(logits))
        backend.fetch([sampled.token_ids, sampled.broken])()
