"""A request that is served as several: its beams, each a request of one token, round by round.

In: what each beam's step gave. Out: who of them goes on in its own blocks, who forks, who ends, and
at last the answers. One beam of each parent inherits its blocks; the others share its full blocks
by reference and compute the tokens of its partial block anew in a block of their own, so that no
block is written by two. Owned by Scheduler, who alone changes requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from tokenry.engine.answers import event_of
from tokenry.engine.beams import BeamSearch
from tokenry.engine.request import Request, Status
from tokenry.messages import AddRequest, TokensEvent
from tokenry.params import SamplingParams
from tokenry.plan import RowResult

ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)
"""What a beam is run with: its most likely tokens are told, the drawn one means nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heir:
    """A beam that goes on as number `beam` with this token; `known` if the runner drew the same."""

    request: Request
    token: int
    beam: int
    known: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Who is who after a round: those that go on, new ones, and those that nobody goes on from."""

    heirs: list[Heir]
    forks: list[Request]
    gone: list[Request]


@dataclass(slots=True, eq=False)
class BeamGroup:
    """Owned by Scheduler.

    ids       under which the answers are told.   members: the beams' requests, in their order.
    results   by beam, what its step gave in this round.
    """

    message: AddRequest
    search: BeamSearch
    members: list[Request] = field(default_factory=list)
    results: dict[int, RowResult] = field(default_factory=dict)
    num_forks: int = 0

    @staticmethod
    def of(message: AddRequest, max_model_len: int) -> BeamGroup:
        """The group of a request with a beam_width."""
        p = message.params
        room = max_model_len - len(message.token_ids)
        search = BeamSearch(
            width=p.beam_width,
            length_penalty=p.length_penalty,
            early_stopping=p.early_stopping,
            max_tokens=room if p.max_tokens is None else min(room, p.max_tokens),
            eos_ids=frozenset(() if p.ignore_eos else message.eos_token_ids),
            stop_ids=frozenset(p.stop_token_ids),
            num_alternatives=p.logprobs,
        )
        return BeamGroup(message, search)

    @property
    def ids(self) -> tuple[str, ...]:
        """Under which the answers are told, the best first."""
        return self.message.beam_ids or (self.message.request_id,)

    @property
    def first(self) -> AddRequest:
        """The message of the one beam of the first round."""
        return msgspec.structs.replace(self.message, params=ONE_TOKEN)

    def begin(self, request: Request) -> None:
        """The one beam of the first round: the prompt."""
        request.group = self
        self.members = [request]

    def answer(self, request: Request, now_s: float) -> list[TokensEvent]:
        """The events that end the search, with the times of one of its requests."""
        answers = self.search.answers(len(self.ids))
        events = []
        for beam_id, one in zip(self.ids, answers, strict=True):
            event = event_of(
                request,
                now_s,
                token_ids=one.tokens,
                logprobs=one.scores,
                finish_reason=one.finish or "length",
                stop_reason=one.stop_reason,
            )
            events.append(msgspec.structs.replace(event, request_id=beam_id))
        return events

    def idle(self, request: Request) -> bool:
        """Whether the beam has done its part of this round: it keeps its blocks for its heirs."""
        return request.beam in self.results and self.members[request.beam] is request

    def note(self, request: Request, row: RowResult) -> bool:
        """Take in a beam's result; whether the round is complete."""
        self.results[request.beam] = row
        return len(self.results) == len(self.members)

    def advance(self) -> Round | None:
        """End the round; None if the search is over."""
        rows = [self.results[i] for i in range(len(self.members))]
        parents = self.members
        self.results = {}
        self.search.advance([row.logprobs[0] for row in rows])
        if self.search.done:
            return None
        heirs: list[Heir] = []
        forks: list[Request] = []
        inherited: set[int] = set()
        self.members = []
        for i, beam in enumerate(self.search.beams):
            parent, token = parents[beam.parent], beam.tokens[-1]
            if parent.status is Status.RUNNING and beam.parent not in inherited:
                inherited.add(beam.parent)
                known = rows[beam.parent].token_ids[:1] == (token,)
                heirs.append(Heir(request=parent, token=token, beam=i, known=known))
                self.members.append(parent)
            else:
                forks.append(self._fork(parent, (*self.message.token_ids, *beam.tokens), i))
                self.members.append(forks[-1])
        gone = [
            parent
            for i, parent in enumerate(parents)
            if i not in inherited and parent.status is Status.RUNNING
        ]
        return Round(heirs=heirs, forks=forks, gone=gone)

    def _fork(self, parent: Request, tokens: Sequence[int], beam: int) -> Request:
        self.num_forks += 1
        return dataclasses.replace(
            parent,
            request_id=f"{self.message.request_id}/{self.num_forks}",
            tokens=list(tokens),
            key=(*parent.key[:2], self.num_forks),
            max_len=len(tokens) + 1,
            status=Status.WAITING,
            source=parent,
            num_shared=len(tokens) - 1,
            beam=beam,
            num_computed=0,
            num_done=0,
            num_pending=0,
            epoch=0,
            block_ids=[],
            block_hashes=[],
        )
