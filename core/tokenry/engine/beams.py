"""Beam search: which continuations of a request's beams live on, and which answers it ends with.

In: the most likely tokens after each beam. Out: the beams of the next round, in the end the best
hypotheses. The choice is transformers' (`GenerationMixin._beam_search`, greedy beams): of all
continuations the best max(2, 1 + ends) * width by the sum of their log-probabilities; those that
end are kept by score / length ** length_penalty if they are among the best `width`; the best
`width` of the others go on. Knows no blocks and no scheduler.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tokenry.messages import FinishReason
from tokenry.plan import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """An answer, or the beginning of one.

    score     sum of its log-probabilities; of an ended one divided by length ** length_penalty.
    parent    index of the beam that it goes on from.
    scores    per token: itself and the alternatives that its request wants to be told.
    """

    tokens: tuple[int, ...] = ()
    score: float = 0.0
    parent: int = 0
    scores: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop_reason: int | None = None


@dataclass(slots=True, kw_only=True)
class BeamSearch:
    """One request's search. Owned by Scheduler.

    max_tokens   of an answer.   num_alternatives: told per token, None: no log-probabilities.
    beams        those that go on, the best first.   ended: the best answers, the best first.
    """

    width: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    max_tokens: int
    eos_ids: frozenset[int]
    stop_ids: frozenset[int]
    num_alternatives: int | None = None
    beams: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])
    ended: list[Hypothesis] = field(default_factory=list)
    done: bool = False

    @property
    def num_candidates(self) -> int:
        """Most likely tokens that are needed of each beam: so many that enough go on even if all
        that can end do.
        """
        return max(2, 1 + len(self.eos_ids | self.stop_ids)) * self.width

    def advance(self, likely: Sequence[TokenLogprobs]) -> None:
        """One round: `likely` has per beam the token drawn (no matter which) and then its most
        likely tokens.
        """
        length = len(self.beams[0].tokens) + 1
        options = (
            (beam.score + entry.logprobs[j], i, j)
            for i, (beam, entry) in enumerate(zip(self.beams, likely, strict=True))
            for j in range(1, len(entry.token_ids))
        )
        first = heapq.nsmallest(self.num_candidates, options, key=lambda o: -o[0])
        best = [self._continued(i, likely[i], j) for _, i, j in first]
        ends = [h for h in best[: self.width] if h.finish is not None]
        ended = [replace(h, score=h.score / length**self.length_penalty) for h in ends]
        if not (self.early_stopping is True and len(self.ended) == self.width):
            self.ended = sorted(self.ended + ended, key=lambda h: -h.score)[: self.width]
        self.beams = [h for h in best if h.finish is None][: self.width]
        self.done = not self.beams or self._settled(length)

    def answers(self, count: int) -> list[Hypothesis]:
        """The best ones that ended; where there are too few, the best that could go on."""
        return [*self.ended, *self.beams][:count]

    def _settled(self, length: int) -> bool:
        """Whether no beam that goes on may change the answers any more."""
        if len(self.ended) < self.width:
            return False
        if self.early_stopping is True:
            return True
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_tokens
        return bool(self.beams[0].score / length**self.length_penalty <= self.ended[-1].score)

    def _continued(self, index: int, entry: TokenLogprobs, at: int) -> Hypothesis:
        beam, token, logprob = self.beams[index], entry.token_ids[at], entry.logprobs[at]
        finish: FinishReason | None = None
        if token in self.eos_ids or token in self.stop_ids:
            finish = "stop"
        elif len(beam.tokens) + 1 >= self.max_tokens:
            finish = "length"
        told: tuple[TokenLogprobs, ...] = ()
        if self.num_alternatives is not None:
            last = 1 + self.num_alternatives
            told = (
                TokenLogprobs(
                    token_ids=(token, *entry.token_ids[1:last]),
                    logprobs=(logprob, *entry.logprobs[1:last]),
                    rank=at,
                ),
            )
        return Hypothesis(
            tokens=(*beam.tokens, token),
            score=beam.score + logprob,
            parent=index,
            scores=beam.scores + told,
            finish=finish,
            stop_reason=token if token in self.stop_ids - self.eos_ids else None,
        )
