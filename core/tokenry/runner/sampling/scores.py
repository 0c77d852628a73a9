"""Log-probabilities of tokens, as they are reported: of the model's raw logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS_AT_ONCE = 32
"""Of one table of log-probabilities in the host's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Log-probabilities on the device: of the given token [n], its rank [n], and the top k [n,
    k].
    """

    chosen: Tensor
    rank: Tensor
    top_logprobs: Tensor
    top_tokens: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """In the order in which they are fetched."""
        return [self.chosen, self.rank, self.top_logprobs, self.top_tokens]


def score(logits: Tensor, tokens: Tensor, k: int) -> Scores:
    """log_softmax of raw logits [n, vocab] at tokens [n], its rank, and the k most likely.

    On the host some rows at a time: a table of all would be memory that the weights could have. A
    row's figures do not depend on the others.
    """
    n, vocab = logits.shape
    if logits.device.type != "cpu" or n <= ROWS_AT_ONCE:
        return _scores(torch.log_softmax(logits.float(), dim=-1), tokens, k)
    table = torch.empty((ROWS_AT_ONCE, vocab))
    k = min(k, vocab)
    # made first: what is made between two tables keeps the heap from using their place again
    whole = Scores(
        chosen=torch.empty(n),
        rank=torch.empty(n, dtype=torch.int64),
        top_logprobs=torch.empty((n, k)),
        top_tokens=torch.empty((n, k), dtype=torch.int64),
    )
    for begin in range(0, n, ROWS_AT_ONCE):
        end = min(n, begin + ROWS_AT_ONCE)
        rows = table[: end - begin]
        torch.log_softmax(logits[begin:end].float(), dim=-1, out=rows)
        some = _scores(rows, tokens[begin:end], k)
        for to, part in zip(whole.tensors, some.tensors, strict=True):
            to[begin:end] = part
    return whole


def _scores(table: Tensor, tokens: Tensor, k: int) -> Scores:
    """Of log-probabilities [n, vocab]."""
    chosen = table.gather(1, tokens.long()[:, None])
    top = table.topk(min(k, table.shape[1]), dim=-1)
    return Scores(
        chosen=chosen[:, 0],
        rank=(table > chosen).sum(-1, dtype=torch.int32).long() + 1,  # 64-bit sums copy the table
        top_logprobs=top.values,
        top_tokens=top.indices,
    )
