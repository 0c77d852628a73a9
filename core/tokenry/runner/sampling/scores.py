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
    if logits.device.type != "cpu" or len(logits) <= ROWS_AT_ONCE:
        return _score(logits, tokens, k)
    split = zip(torch.split(logits, ROWS_AT_ONCE), torch.split(tokens, ROWS_AT_ONCE), strict=True)
    parts = [_score(rows, ids, k).tensors for rows, ids in split]
    chosen, rank, top_logprobs, top_tokens = (torch.cat(same) for same in zip(*parts, strict=True))
    return Scores(chosen=chosen, rank=rank, top_logprobs=top_logprobs, top_tokens=top_tokens)


def _score(logits: Tensor, tokens: Tensor, k: int) -> Scores:
    table = torch.log_softmax(logits.float(), dim=-1)
    chosen = table.gather(1, tokens.long()[:, None])
    top = table.topk(min(k, table.shape[1]), dim=-1)
    return Scores(
        chosen=chosen[:, 0],
        rank=(table > chosen).sum(-1) + 1,
        top_logprobs=top.values,
        top_tokens=top.indices,
    )
