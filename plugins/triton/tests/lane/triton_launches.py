"""Launches of attention that tests make by hand."""

from __future__ import annotations

import torch

from tokenry.backend.base import StepBatch
from tokenry.backend.contract import Bucket


def long_decode(lengths, **rule):
    """Decodes of so many keys, one KV head for two of 16 dims; request i's values hang on i."""
    S, blocks = len(lengths), -(-max(lengths) // 16)
    table = torch.arange(1, S * blocks + 1, dtype=torch.int32).view(S, blocks)
    kv = torch.full((2, S * blocks + 1, 16, 1, 16), 50.0)
    q, k, v = torch.empty(S, 2, 16), torch.empty(S, 1, 16), torch.empty(S, 1, 16)
    for i, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(i)
        old = torch.randn((2, length, 1, 16), generator=generator)
        kv[:, table[i].long()] = torch.nn.functional.pad(
            old, (0, 0, 0, 0, 0, blocks * 16 - length), value=50.0
        ).view(2, blocks, 16, 1, 16)
        q[i], k[i], v[i] = torch.randn((2, 16), generator=generator), *old[:, -1]
    lens = torch.tensor(lengths, dtype=torch.int32)
    at = lens - 1
    batch = StepBatch(
        bucket=Bucket(phase="decode", seqs=S, tokens=S, kv_blocks=blocks),
        token_ids=at, positions=at, slots=table[torch.arange(S), at.long() // 16] * 16 + at % 16,
        q_start=torch.arange(S + 1, dtype=torch.int32), q_lens=torch.ones_like(lens),
        seq_lens=lens, block_table=table, logit_rows=at, extra={},
    )  # fmt: skip
    return q, k, v, kv, batch
