"""Log-probabilities of tokens, as they are reported: of the model's raw logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """log_softmax of raw logits [n, vocab] at tokens [n], its rank, and the k most likely."""
    table = torch.log_softmax(logits.float(), dim=-1)
    chosen = table.gather(1, tokens.long()[:, None])
    top = table.topk(min(k, table.shape[1]), dim=-1)
    return Scores(
        chosen=chosen[:, 0],
        rank=(table > chosen).sum(-1) + 1,
        top_logprobs=top.values,
        top_tokens=top.indices,
    )
