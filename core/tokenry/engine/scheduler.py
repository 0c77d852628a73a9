"""Every request from its arrival to its end: what came in, what a step takes, what it gave.

In: add(request), abort(id), update(plan, result). Out: schedule() -> StepPlan, events. Owns request
status; a `Planner` makes the rows of a step. Knows nothing of tensors, devices or text. Every
request has num_computed <= num_tokens; a step narrows the gap within one token budget, so prefill,
chunked prefill, decode and resumption are one case.

Steps run in the order of their plans, and a plan may be made while the step before it is in flight.
Therefore:
- a sampled token in flight counts as a token (num_pending): its KV is planned before anybody here
  knows its id;
- blocks may be released while a step in flight still uses them: whoever gets them next uses them in
  a later step;
- a block is entered in the prefix cache only when the result of the step that filled it is here, so
  a step that failed leaves nothing to be found.

Who goes first, and how large a step may be, a `Policy` says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tokenry.engine.answers import check_length, event_of, take_tokens
from tokenry.engine.beam_group import BeamGroup
from tokenry.engine.block_manager import BlockManager
from tokenry.engine.gate import Matcher
from tokenry.engine.limits import Counters, EngineLimits
from tokenry.engine.planner import Planned, Planner
from tokenry.engine.prefix import enter_blocks, shares_prompt
from tokenry.engine.request import Request, Status
from tokenry.engine.retreat import ALONE_TRIES
from tokenry.engine.roster import Roster
from tokenry.engine.slo import make_policy
from tokenry.errors import DeviceOOM, Refusal, RequestError
from tokenry.messages import AddRequest, TokensEvent
from tokenry.plan import RowResult, StepPlan, StepResult

log = logging.getLogger(__name__)
OOM_MEND = "--max-num-batched-tokens, --max-model-len or --memory-fraction lower"


class Scheduler:
    """Owns every request and the block manager."""

    def __init__(self, limits: EngineLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._policy = make_policy(limits)
        self.blocks = BlockManager(
            limits.num_blocks, limits.block_size, prefix_caching=limits.prefix_caching
        )
        self.counters = Counters()
        self._roster = Roster(self.blocks, self.counters, self._policy.queue, clock)
        self._planner = Planner(limits, self._policy, self.blocks, self._roster, self._refuse)
        self._in_flight: dict[int, tuple[Planned, ...]] = {}
        self._events: list[TokensEvent] = []
        self._arrivals = 0

    # ---- what comes in -----------------------------------------------------------------------

    def add(self, message: AddRequest, matcher: Matcher | None = None) -> None:
        """Queue a request. Raises RequestError for one that can never run."""
        limits = self.limits
        num_prompt = len(message.token_ids)
        if message.request_id in self._roster:
            raise RequestError(f"Request id {message.request_id!r} is in use.", param="request_id")
        check_length(num_prompt, message.params.max_tokens, limits.max_model_len)
        self._arrivals += 1
        urgency = self._policy.urgency(message.priority, self.counters.steps, filler=message.filler)
        group = BeamGroup.of(message, limits.max_model_len) if message.params.beam_width else None
        request = Request.from_message(
            message if group is None else group.first,
            matcher=matcher,
            key=(urgency, self._arrivals),
            seed=(limits.seed << 32) ^ self._arrivals,
            max_model_len=limits.max_model_len,
            now_s=self._clock(),
        )
        self._roster.requests[request.request_id] = request
        self.counters.prompt_tokens += num_prompt
        if group is not None:
            group.begin(request)
            self._roster.groups.update(dict.fromkeys(group.ids, group))
        source = self._roster.requests.get(message.source or "")
        if source is not None and limits.forks and shares_prompt(request, source):
            request.source, request.num_shared = source, num_prompt
            if source.num_done < num_prompt > limits.block_size:
                self._roster.held.setdefault(source.request_id, []).append(request)
                return  # until the prompt is computed: see _release
        self._roster.queue(request)

    def abort(self, request_id: str) -> bool:
        """End a request now, without an event; whether there was one."""
        group = self._roster.groups.get(request_id)
        request = self._roster.requests.get(request_id)
        if group is not None:
            self._roster.end_group(group)
        elif request is not None:
            self._roster.end(request)
        else:
            return False
        self.counters.aborted += 1
        return True

    def reset_prefix_cache(self) -> None:
        """Forget which blocks hold what; running requests go on."""
        self._roster.reset_prefix_cache()

    # ---- a step ------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run before a step in flight has ended (or nothing
        is there).
        """
        now_s = self._clock()
        planned, new = self._planner.draft(now_s)
        if not planned:
            stuck = not self._in_flight and self._roster.waiting.head() is not None
            return self.schedule() if stuck and self._roster.end_idle_beam() else None
        self.counters.steps += 1
        plan = StepPlan(
            step=self.counters.steps,
            new=tuple(new),
            rows=tuple(p.row for p in planned),
            forget=tuple(self._roster.forget),
        )
        self._roster.forget.clear()
        self._in_flight[plan.step] = tuple(planned)
        self._policy.launched(plan, now_s)
        return plan

    # ---- what a step gave --------------------------------------------------------------------

    def _refuse(self, request: Request, refusal: Refusal) -> None:
        self._fail(request, refusal.message, refusal)

    def _fail(self, request: Request, error: str, refusal: Refusal | None = None) -> None:
        if request.group is not None:
            self._roster.end_group(request.group)
        else:
            self._roster.end(request)
        event = event_of(
            request, self._clock(), finish_reason="error", error=error, refusal=refusal
        )
        self._events.append(event)

    def update(self, plan: StepPlan, result: StepResult) -> None:
        """Take in the result of a step: tokens, ends, blocks for the prefix cache."""
        planned_rows = self._in_flight.pop(plan.step)
        now_s = self._clock()
        self._policy.ended(plan, now_s)
        if any(self._counts(plan, p.request) for p in planned_rows):
            self._planner.retreat.fitted()
        sampled_again = {
            id(p.request)
            for later in self._in_flight.values()
            for p in later
            if p.row.sample and p.epoch == p.request.epoch
        }
        for planned, row in zip(planned_rows, result.rows, strict=True):
            request = planned.request
            if not self._counts(plan, request):
                continue
            request.num_ooms = 0
            if row.error is not None:
                self._fail(request, row.error, row.refusal)
                continue
            if planned.row.sample:
                request.num_pending = int(id(request) in sampled_again)
            if request.scores_prompt:
                if planned.epoch != request.epoch:
                    continue  # preempted since: it scores its prompt anew and draws the same token
                request.prompt_logprobs.extend(row.prompt_logprobs)
            self._take(request, planned, row, now_s)

    def fail(self, plan: StepPlan, cause: str) -> None:
        """The step raised: its requests end with the cause, everybody else goes on."""
        self.counters.step_failures += 1
        self._policy.ended(plan, self._clock())
        for planned in self._in_flight.pop(plan.step):
            if self._counts(plan, planned.request):
                self._fail(planned.request, cause)

    def retry(self, plan: StepPlan, error: DeviceOOM) -> None:
        """The device had no memory for the step, which did not happen, then: its requests are where
        they were before it, the least urgent of them wait again, and the next steps are smaller. A
        request that does not even fit alone ends.

        What a later step in flight gives these requests rests on what was not computed: it is
        dropped.
        """
        self.counters.device_ooms += 1
        self._policy.ended(plan, self._clock())
        rows = self._in_flight.pop(plan.step)
        live = [p for p in rows if self._counts(plan, p.request)]
        running = sorted((r for p in live if (r := self._undo(p)) is not None), key=lambda r: r.key)
        if not live:
            return  # its requests were taken back when the step before it failed
        retreat = self._planner.retreat
        retreat.shrink(len(live), sum(p.row.num_new for p in live))
        log.warning(
            "step %d (%d requests, %d tokens) had no device memory and is tried again with at most "
            "%d requests and %d tokens: %s",
            plan.step, len(rows), plan.num_tokens, retreat.rows, retreat.tokens, error.message,
        )  # fmt: skip
        if len(live) == 1:
            alone = live[0].request
            alone.num_ooms += 1
            if alone.num_ooms == ALONE_TRIES:
                self.counters.step_failures += 1
                self._fail(alone, str(_too_much(live[0], error)))
                return
        for i, request in enumerate(running):
            if i >= retreat.rows or request.pooling is not None:
                self._roster.preempt(request)  # a pooled sum of its rows cannot be taken back

    @staticmethod
    def _counts(plan: StepPlan, request: Request) -> bool:
        """Whether what the step gives the request means something to it."""
        return request.status is not Status.ENDED and plan.step > request.void_until

    def _undo(self, planned: Planned) -> Request | None:
        """The row was not computed; gives its request if that still runs, in the same life."""
        request = planned.request
        if request.status is Status.RUNNING and request.epoch != planned.epoch:
            return None  # it began anew since
        request.void_until = self.counters.steps
        request.num_pending = 0
        if request.status is Status.WAITING:
            return None  # preempted since: nothing is in flight for it any more
        request.num_computed = planned.row.num_computed
        request.introduce = True  # whatever the runner made of the step
        self._roster.forget.append(request.request_id)
        return request

    def _take(self, request: Request, planned: Planned, row: RowResult, now_s: float) -> None:
        """Append the row's tokens until one ends the request; enter its full blocks in the prefix
        cache.
        """
        share = planned.row
        done = share.num_computed + share.num_new
        lives = planned.epoch == request.epoch and request.status is Status.RUNNING
        if lives:
            request.num_done = max(request.num_done, done)
            if self._roster.held and request.num_done >= request.num_prompt:
                self._roster.release(request)
        if request.group is not None:
            self._take_beam(request.group, request, planned, row)
            return
        taken = take_tokens(request, row.token_ids)
        if taken.count and not request.first_token_s:
            request.first_token_s = now_s
        finish = taken.finish
        if row.mu is not None:
            request.mu = row.mu
        self.counters.generation_tokens += taken.count
        if finish is None and not share.sample and done >= request.max_len:
            # nothing was to be drawn (max_tokens 0, or a vector is all that is wanted)
            finish = "length" if request.pooling is None else "stop"
        if lives:
            enter_blocks(self.blocks, request, done)
        if taken.count or finish:
            if finish is not None:
                self._policy.answered(request)
                self._roster.end(request)
            event = event_of(
                request,
                now_s,
                token_ids=row.token_ids[: taken.count],
                logprobs=row.logprobs[: taken.count],
                finish_reason=finish,
                stop_reason=taken.stop_reason,
                complete=taken.complete,
                pooled=row.pooled,
            )
            self._events.append(event)

    def _take_beam(
        self, group: BeamGroup, request: Request, planned: Planned, row: RowResult
    ) -> None:
        """A beam's part of the round; the last one's ends it, and perhaps the search."""
        if planned.epoch == request.epoch and request.status is Status.RUNNING:
            enter_blocks(self.blocks, request, request.num_done)
        if not planned.row.sample:
            return
        complete = group.note(request, row)
        if request.status is Status.WAITING:
            self._roster.end(request)  # preempted since: it need not come back
        if not complete:
            return
        after = group.advance()
        if after is None:
            self._roster.end_group(group)
            events = group.answer(request, self._clock())
            self.counters.generation_tokens += sum(len(event.token_ids) for event in events)
            self._events += events
            return
        for heir in after.heirs:
            one = heir.request
            one.tokens.append(heir.token)
            one.beam, one.max_len = heir.beam, one.max_len + 1
            if not heir.known:  # the runner believes that the token it drew is the next
                one.introduce = True
                self._roster.forget.append(one.request_id)
        for fork in after.forks:
            self._roster.requests[fork.request_id] = fork
            self._roster.queue(fork)
        for parent in after.gone:
            self._roster.end(parent)

    # ---- what others may ask -----------------------------------------------------------------

    def take_events(self) -> list[TokensEvent]:
        """Events since the last call."""
        events, self._events = self._events, []
        return events

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._roster.running)

    @property
    def num_prefilling(self) -> int:
        """Those of them whose prompt was not given to steps whole yet."""
        return sum(r.num_computed < r.num_prompt for r in self._roster.running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, and those that wait for another's prompt."""
        return self._roster.num_waiting

    def kv_waste(self) -> float:
        """Share of the held KV slots that hold no token."""
        return self._roster.kv_waste()

    def check_integrity(self) -> None:
        """Blocks and requests agree. Raises IntegrityError or AssertionError."""
        self._roster.check()


def _too_much(planned: Planned, error: DeviceOOM) -> DeviceOOM:
    """What ends a request whose step does not fit the device's memory by itself."""
    row, request = planned.row, planned.request
    return DeviceOOM(
        f"The device had no memory for a step of this request alone, {ALONE_TRIES} times: tokens "
        f"{row.num_computed} to {row.num_computed + row.num_new} of {len(request.tokens)}. "
        f"{error.message}",
        mend=error.mend or OOM_MEND,
    )
