"""What the runner keeps of a request between steps, on the host.

Owned by ModelRunner, written on the thread that runs steps. A token that was sampled in the last
step is on the device
only; `feedback` says where, until the host learns it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenry.backend.contract import IntArray
from tokenry.errors import Refusal
from tokenry.params import SamplingParams
from tokenry.plan import Mask, NewRequest
from tokenry.runner.sampling.processors import LogitsProcessor
from tokenry.runner.sampling.rules import is_plain


class RequestState:
    """Owned by ModelRunner.

    tokens     [capacity] int32; the first num_known are known.
    blocks     [capacity] int32; the first num_blocks are held.
    feedback   row of the last step's sampled tokens that holds token number num_known, None if
               there is none.
    processor  the request's own logits processor.
    mask       what its grammar lets this step draw.
    plain      its parameters alone change no logit.
    num_scores likely tokens to report with each drawn one, None: no log-probabilities.
    mu         mirostat's bound after the last known token, None before the first.
    pooling    what vector it ends with, None if it gives tokens.
    pooled     its pooled row so far (for the mean the sum); written where results are waited for.
    refused    why this device cannot serve the request, None if it can.
    """

    __slots__ = (
        "blocks", "feedback", "mask", "mu", "num_blocks", "num_known", "num_prompt", "num_scores",
        "params", "plain", "pooled", "pooling", "processor", "refused", "seed", "tokens",
    )  # fmt: skip

    def __init__(self, new: NewRequest, block_size: int) -> None:
        self.params: SamplingParams = new.params
        self.seed = new.seed
        self.num_prompt = new.num_prompt
        self.num_known = len(new.token_ids)
        self.tokens: IntArray = np.zeros(self.num_known + 64, np.int32)
        self.tokens[: self.num_known] = new.token_ids
        self.num_blocks = len(new.block_ids)
        room = max(self.num_blocks, self.num_known // block_size) + 8
        self.blocks: IntArray = np.zeros(room, np.int32)
        self.blocks[: self.num_blocks] = new.block_ids
        self.feedback: int | None = None
        self.processor: LogitsProcessor | None = None
        self.mask: Mask | None = None
        self.refused: Refusal | None = None
        self.mu = new.mu
        self.plain = is_plain(self.params)
        self.num_scores = self.params.logprobs
        if new.num_candidates:
            self.num_scores = max(self.params.logprobs or 0, new.num_candidates)
        self.pooling = new.pooling
        self.pooled: NDArray[Any] | None = None

    def learn(self, token_ids: tuple[int, ...], mu: float | None = None) -> None:
        """The host now knows the next tokens, and mirostat's bound after them."""
        self.mu = self.mu if mu is None else mu
        end = self.num_known + len(token_ids)
        if end > len(self.tokens):
            self.tokens = np.concatenate((self.tokens, np.zeros(end, np.int32)))
        for at, token in enumerate(token_ids, self.num_known):  # one, mostly
            self.tokens[at] = token
        self.num_known = end

    def hold(self, block_ids: tuple[int, ...]) -> None:
        """More blocks."""
        end = self.num_blocks + len(block_ids)
        if end > len(self.blocks):
            self.blocks = np.concatenate((self.blocks, np.zeros(end, np.int32)))
        self.blocks[self.num_blocks : end] = block_ids
        self.num_blocks = end

    @property
    def history(self) -> IntArray:
        """Known tokens, [num_known] int32."""
        return self.tokens[: self.num_known]
