"""One request as the engine sees it: its tokens, its blocks, how far it is, and the times of its
life.

Owned by Scheduler: nobody else writes it. Knows nothing of text, tensors or HTTP.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenry.engine.gate import Matcher
from tokenry.messages import AddRequest
from tokenry.params import SamplingParams
from tokenry.plan import NewRequest, TokenLogprobs
from tokenry.pooling import PoolingParams

if TYPE_CHECKING:
    from tokenry.engine.beam_group import BeamGroup


class Status(enum.Enum):
    """Where a request is: in the queue (new or preempted), in the running list, or done with."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Request:
    """Owned by Scheduler.

    tokens         prompt and known output.
    num_computed   tokens whose KV is computed, or will be when the steps in flight have run.
    num_done       tokens whose KV is computed, as the results that are here say.
    source         another request whose first num_shared tokens are this one's, so that its blocks
                   may be shared.
    group, beam    the search that it is a beam of, and which one in this round.
    introduce      the runner has to be told its tokens anew.
    num_ooms       steps of this request alone that did not fit the device, since one that did.
    void_until     what the steps up to this number give it means nothing: one of them did not run.
    num_pending    1 while a sampled token is in flight: it exists, but nobody here knows it yet.
    filler         it runs on what others leave: see filler.py.
    key            place in the queue and in the running list: the smallest goes first.
    block_ids      blocks held, in the order of the tokens.
    block_hashes   chained hashes of the full blocks that are entered in the prefix cache, or came
                   from it.
    scores_prompt  prompt log-probabilities are wanted and not delivered, so every prompt token must
                   be computed.
    mu             mirostat's bound after the last token, as the runner told it.
    matcher        how far it is in its grammar, where it has one; follows `tokens`.
    epoch          counts preemptions, so that a result of an older life does not touch a newer
                   one's blocks.
    """

    request_id: str
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    stop_ids: frozenset[int]
    eos_ids: frozenset[int]
    seed: int
    key: tuple[int, ...]
    priority: int
    cache_salt: str
    lora_name: str | None
    max_len: int
    queued_s: float
    filler: bool = False
    pooling: PoolingParams | None = None
    matcher: Matcher | None = None
    status: Status = Status.WAITING
    num_computed: int = 0
    num_done: int = 0
    num_pending: int = 0
    source: Request | None = None
    num_shared: int = 0
    group: BeamGroup | None = None
    beam: int = 0
    introduce: bool = False
    void_until: int = 0
    num_ooms: int = 0
    num_cached: int = 0
    epoch: int = 0
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    mu: float | None = None
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    scores_prompt: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @classmethod
    def from_message(
        cls,
        message: AddRequest,
        *,
        matcher: Matcher | None = None,
        key: tuple[int, ...],
        seed: int,
        max_model_len: int,
        now_s: float,
    ) -> Request:
        """A waiting request. max_len is where it must end, prompt and output together."""
        params = message.params
        room = params.max_tokens if params.max_tokens is not None else max_model_len
        eos = () if params.ignore_eos else message.eos_token_ids
        return cls(
            request_id=message.request_id,
            tokens=list(message.token_ids),
            num_prompt=len(message.token_ids),
            params=params,
            stop_ids=frozenset(params.stop_token_ids),
            eos_ids=frozenset(eos),
            seed=seed if params.seed is None else params.seed,
            key=key,
            priority=message.priority,
            filler=message.filler,
            cache_salt=message.cache_salt,
            lora_name=message.lora_name,
            max_len=min(max_model_len, len(message.token_ids) + room),
            queued_s=now_s,
            matcher=matcher,
            pooling=message.pooling,
            scores_prompt=params.prompt_logprobs is not None,
        )

    def introduction(self, block_ids: tuple[int, ...]) -> NewRequest:
        """What the runner must know of it, which holds these blocks."""
        return NewRequest(
            request_id=self.request_id,
            token_ids=tuple(self.tokens),
            num_prompt=self.num_prompt,
            params=self.params,
            seed=self.seed,
            block_ids=block_ids,
            pooling=self.pooling,
            mu=self.mu,
            num_candidates=0 if self.group is None else self.group.search.num_candidates,
        )

    @property
    def told_as(self) -> str:
        """The id under which its events go out."""
        return self.request_id if self.group is None else self.group.ids[0]

    @property
    def num_tokens(self) -> int:
        """Known tokens and the one in flight."""
        return len(self.tokens) + self.num_pending

    @property
    def num_output(self) -> int:
        """Known output tokens."""
        return len(self.tokens) - self.num_prompt


def last_running(order: Sequence[Request], i: int) -> Request | None:
    """The least urgent after position i that still holds blocks."""
    return next((r for r in reversed(order[i + 1 :]) if r.status is Status.RUNNING), None)
