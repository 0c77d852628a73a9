"""The steps that need the most memory, to be run before the KV cache is planned.

In: the largest step that can come, as numbers. Out: host batches on block 0 of a tiny KV. What a
step needs grows in three ways: with its tokens and requests, with the context before its tokens,
and with the logits that are wanted, so each way has its batch. No tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from tokenry.backend.contract import Bucket, Caps, HostBatch, Phase
from tokenry.runner.shapes import Extent, scored_tokens

TIME_S = 0.75
"""What the deep steps may take together; attention over a long context is slow on slow devices, and
no user waits for it. Ops work on a tile of a request's tokens at once, so that the first steps tell
most of what the last would.
"""


def deep_batch(
    num_tokens: int, context: int, *, width: int, block_size: int, bucket: Bucket
) -> HostBatch:
    """The last `num_tokens` of one request of `context` tokens; every block of it is block 0.

    width  of the block table. bucket  of one request and num_tokens tokens.
    """
    at = np.arange(context - num_tokens, context, dtype=np.int32)
    rows = at if bucket.logits == "all" else at[-1:]
    return HostBatch(
        bucket=bucket,
        token_ids=np.zeros(num_tokens, np.int32),
        positions=at,
        slots=at % block_size,
        q_start=np.array([0, num_tokens], np.int32),
        q_lens=np.array([num_tokens], np.int32),
        seq_lens=np.array([context], np.int32),
        block_table=np.zeros((1, width), np.int32),
        logit_rows=rows - at[0],
        prev_row=np.full(num_tokens, -1, np.int32),
    )


def run_deep_steps(
    execute: Callable[[HostBatch], None],
    caps: Caps,
    extent: Extent,
    context: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Run a step with all logits, as prompt log-probabilities want them, then the end of one
    request of `context` tokens, with more and more of them while TIME_S lasts; gives the largest
    number.
    """
    size = extent.block_size or 1
    width = -(-context // size) if caps.graphs == "none" else max(1, extent.max_blocks)
    most = context if not caps.phases.chunked else min(extent.max_tokens, context)
    phase: Phase = "mixed" if caps.phases.mixed else "prefill"
    scored = min(scored_tokens(caps, extent), most)
    bucket = Bucket(phase, 1, scored, 0, "all")
    execute(deep_batch(scored, scored, width=width, block_size=size, bucket=bucket))
    num_tokens, spent = most if not caps.phases.chunked else min(16, most), 0.0
    while True:
        bucket = Bucket(phase, 1, num_tokens, 0)
        start = clock()
        execute(deep_batch(num_tokens, context, width=width, block_size=size, bucket=bucket))
        took = clock() - start
        spent += took
        fits = int(num_tokens * (TIME_S - spent) / took) if took else most
        wanted = most if most <= min(fits, 8 * num_tokens) else min(most, 4 * num_tokens)
        if wanted == num_tokens or wanted > fits:
            return num_tokens
        num_tokens = wanted
