"""StepPlan and StepResult: the only things that cross between engine/ (who runs) and runner/ (how
it runs).

In one direction the plan of a step: which requests, how many tokens each, in which blocks. In the
other its outcome:
the sampled tokens. Plain Python data, so that the scheduler can be simulated at any scale without a
tensor.

The runner keeps a request's tokens, blocks and sampling parameters from the plan that introduces it
(`new`) until
the plan that forgets it (`forget`); every other plan carries differences only. A preempted request
is forgotten and
later introduced again with all of its tokens.

What there is of each row in each step is a msgspec struct, as messages are: frozen too, and made in
a tenth of the time of a frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec

from tokenry.errors import Refusal
from tokenry.params import SamplingParams
from tokenry.pooling import PoolingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Mask = Callable[[], "NDArray[np.int32]"]
"""Waits for the packed bits [num_words] int32 of the tokens that may be drawn, token 32 * w + b in
bit b of word w; tokens beyond the last word may not. It is made while the step runs. Raises
RequestError where the request's grammar cannot go on.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """A request that the runner has not seen (or has forgotten).

    token_ids    prompt and, after a preemption, the output so far.
    num_prompt   how many of them are prompt: penalties and prompt log-probabilities need the
                 border.
    block_ids    blocks held before this step's row adds its own (prefix-cache hits).
    seed         the request's own random stream; with the output position it fixes every draw.
    mu           mirostat's bound after the last token, None before the first.
    num_candidates   so many of the most likely tokens are told, whatever params.logprobs says.
    pooling      the row that reaches the prompt's end gives a vector, and no token is drawn.
    """

    request_id: str
    token_ids: tuple[int, ...]
    num_prompt: int
    params: SamplingParams
    seed: int
    block_ids: tuple[int, ...] = ()
    mu: float | None = None
    num_candidates: int = 0
    pooling: PoolingParams | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One request's share of a step: compute tokens [num_computed, num_computed + num_new).

    new_block_ids   appended to the request's blocks before the step.
    sample          the row reaches the request's last token, so a token is drawn from its logits.
    mask            what its grammar lets be drawn, where the request has one.
    """

    request_id: str
    num_computed: int
    num_new: int
    new_block_ids: tuple[int, ...] = ()
    sample: bool = False
    mask: Mask | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step. A token that the engine does not know yet (sampled by the step still in flight) is
    simply the
    request's next one: the runner takes it from the device.
    """

    step: int
    new: tuple[NewRequest, ...] = ()
    rows: tuple[Row, ...] = ()
    forget: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(row.num_new for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen (or prompt) token first, then the most likely
    ones in order.

    rank   1 for the most likely token of the vocabulary, counted for the chosen token.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int


class RowResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a row gave: a sampled token if it had `sample` (more with speculation), log-
    probabilities if asked.

    prompt_logprobs   for the positions of this row that are prompt: entry i is about token
                      num_computed + i + 1.
    error             the row could not be computed (NaN logits): the request fails with this text.
    mu                mirostat's bound after the sampled token, where the request uses it.
    pooled            the vector of a pooling request, float32 little-endian.
    refusal           set beside error where the request asks for what cannot be served.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    pooled: bytes | None = None
    error: str | None = None
    refusal: Refusal | None = None
    mu: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The outcome of the plan with the same number, rows in the plan's order."""

    step: int
    rows: tuple[RowResult, ...] = field(default=())


class StepRunner(Protocol):
    """What the engine needs of a runner."""

    def run(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Launch the step; the returned function waits for its outcome. Steps are run in the order
        of their plans.

        DeviceOOM from either call: the step did not happen; its requests, forgotten and introduced
        anew, are in a later plan, which writes all KV again that this step was to write. Any other
        exception fails the requests of the plan. The step after it may be launched already, with
        rows of these requests: the runner reports them by `RowResult.error`, and computes the
        others.
        """
        ...
