"""The rows of the next step: who gets how many tokens, in which blocks.

In: the roster, what the policy says. Out: rows and the requests that the runner must be told of.
Owned by Scheduler, who numbers the plan and takes in what the step gave; knows nothing of results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from tokenry.engine.answers import too_large
from tokenry.engine.block_manager import BlockManager
from tokenry.engine.filler import who_yields
from tokenry.engine.limits import EngineLimits
from tokenry.engine.policy import Policy
from tokenry.engine.prefix import find_prefix
from tokenry.engine.request import Request, Status, last_running
from tokenry.engine.retreat import Retreat
from tokenry.engine.roster import Roster
from tokenry.errors import Refusal
from tokenry.plan import NewRequest, Row


class Planned(msgspec.Struct, frozen=True):
    """A row in flight: whose it is, and in which of its lives."""

    request: Request
    row: Row
    epoch: int


class Planner:
    """Owned by Scheduler.

    refuse    ends a request that can never go on.
    retreat   how large a step may be.
    """

    def __init__(
        self,
        limits: EngineLimits,
        policy: Policy,
        blocks: BlockManager,
        roster: Roster,
        refuse: Callable[[Request, Refusal], None],
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self._policy = policy
        self._roster = roster
        self._refuse = refuse
        self.retreat = Retreat(limits)

    def draft(self, now_s: float) -> tuple[list[Planned], list[NewRequest]]:
        """Rows of the next step, none if nothing can run now, and the requests new to the
        runner.
        """
        planned: list[Planned] = []
        new: list[NewRequest] = []
        running = self._roster.running
        budget = min(self._policy.begin(running, now_s), self.retreat.tokens)
        order, num_first = self._policy.order(running)
        num_preempted = self._roster.counters.preemptions
        budget, preempted = self._plan_running(planned, new, order, range(num_first), budget)
        if not preempted:
            budget = self._plan_waiting(planned, new, budget, fillers=False)
            rest = range(num_first, len(order))
            budget, _ = self._plan_running(planned, new, order, rest, budget)
        if self._roster.counters.preemptions == num_preempted:  # nobody is let in where it was sent
            self._plan_waiting(planned, new, budget, fillers=True)
        return planned, new

    def _plan_running(
        self,
        planned: list[Planned],
        new: list[NewRequest],
        order: Sequence[Request],
        span: range,
        budget: int,
    ) -> tuple[int, bool]:
        """Rows for `order[span]`; gives what is left of the budget, and if one that is no
        filler was preempted.
        """
        preempted, most = False, self.retreat.rows
        for i in span:
            request = order[i]
            if budget <= 0 or len(planned) >= most:
                break
            if request.status is not Status.RUNNING:
                continue  # it gave up its blocks to one before it
            num_new = min(self._gap(request), budget)
            if num_new <= 0:
                continue
            num_before = len(request.block_ids)
            block_ids = self._grow(request, num_new)
            while block_ids is None and (victim := last_running(order, i)) is not None:
                self._roster.preempt(victim)
                preempted = preempted or not victim.filler
                block_ids = self._grow(request, num_new)
            if block_ids is None:
                # nobody is less urgent: it gives up its own blocks, or nobody else holds any and it
                # can never go on
                if len(self._roster.running) == 1:
                    refusal = too_large(self.blocks, request.num_computed + num_new)
                    self._refuse(request, refusal)
                else:
                    self._roster.preempt(request)
                preempted = True
                break
            if request.introduce:
                request.introduce = False
                new.append(request.introduction(tuple(request.block_ids[:num_before])))
            self._plan_row(planned, request, num_new, block_ids)
            budget -= num_new
        return budget, preempted

    def _plan_waiting(
        self, planned: list[Planned], new: list[NewRequest], budget: int, *, fillers: bool
    ) -> int:
        """Admit from the queue while sequences, tokens and blocks last: the fillers, or those
        before them, for whom fillers that run make room. Nobody overtakes. Gives what is left of
        the budget.
        """
        waiting, reserved = self._roster.waiting, None
        while budget > 0 and len(planned) < self.retreat.rows:
            request = waiting.head()
            if request is None or request.filler is not fillers:
                break
            if request.num_pending:
                break  # preempted with a token in flight: the runner must be told all tokens
            needed = self.blocks.num_blocks_for(len(request.tokens))
            if needed > self.blocks.num_usable:
                refusal = too_large(self.blocks, len(request.tokens))
                self._refuse(request, refusal)
                continue
            if len(self._roster.running) >= self.limits.max_num_seqs:
                if not self._make_room(request, num_missing=0):
                    break
                reserved = None
            prefix, hashes = find_prefix(self.blocks, request, pools_whole=self.limits.pools_whole)
            num_cached = len(prefix) * self.limits.block_size
            num_new = len(request.tokens) - num_cached
            if num_new > budget and not self.limits.chunked_prefill:
                assert planned, "limits: a whole request fits an empty step"
                break
            reserved = self._num_reserved() if reserved is None else reserved
            missing = needed - len(prefix) + reserved - self.blocks.num_takable_after(prefix)
            if missing > 0:
                if not self._make_room(request, num_missing=missing):
                    break
                reserved = None
                continue
            num_new = min(num_new, budget)
            self._roster.admit(request, prefix, hashes, num_cached)
            block_ids = self._grow(request, num_new)
            assert block_ids is not None, "room was checked"
            reserved += needed - len(request.block_ids)
            new.append(request.introduction(tuple(prefix)))
            self._plan_row(planned, request, num_new, block_ids)
            budget -= num_new
        return budget

    def _num_reserved(self) -> int:
        """Blocks that those who run still need for tokens that they have."""
        return sum(
            max(0, self.blocks.num_blocks_for(len(r.tokens)) - len(r.block_ids))
            for r in self._roster.running
        )

    def _make_room(self, request: Request, *, num_missing: int) -> bool:
        """Whether a filler gave up its place for the request, which is short of so many blocks."""
        yielding = who_yields(
            self._roster.running, request, num_missing, self.blocks.num_blocks_for
        )
        if yielding is not None:
            self._roster.preempt(yielding)
        return yielding is not None

    def _gap(self, request: Request) -> int:
        """Tokens that the request could compute now."""
        num_tokens = request.num_tokens
        if request.num_pending and (num_tokens >= request.max_len or request.params.needs_history):
            return 0  # its next step needs a token that is in flight, or that token is its last
        return num_tokens - request.num_computed

    def _grow(self, request: Request, num_new: int) -> tuple[int, ...] | None:
        """Blocks for num_new more tokens, None if there are not enough."""
        end, num_held = request.num_computed + num_new, len(request.block_ids)
        if end <= num_held * self.blocks.block_size:
            return ()
        block_ids = self.blocks.allocate(self.blocks.num_blocks_for(end) - num_held)
        if block_ids is not None:
            request.block_ids.extend(block_ids)
        return block_ids

    def _plan_row(
        self, planned: list[Planned], request: Request, num_new: int, block_ids: tuple[int, ...]
    ) -> None:
        num_computed = request.num_computed
        reaches_end = num_computed + num_new == request.num_tokens
        sample = reaches_end and request.max_len > request.num_prompt
        row = Row(
            request_id=request.request_id,
            num_computed=num_computed,
            num_new=num_new,
            new_block_ids=block_ids,
            sample=sample,
            mask=request.matcher.mask() if sample and request.matcher else None,
        )
        request.num_computed = num_computed + num_new
        request.num_pending = int(sample)
        planned.append(Planned(request, row, request.epoch))
