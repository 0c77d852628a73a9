"""The `slo` policy: as many requests as possible within their latency targets, and nobody starves.

In: requests with targets (SamplingParams: ttft_target_ms, tpot_target_ms, deadline_ms), the times
at which steps begin and end. Out: an order and a token budget per step. Reads no clock: every time
is handed in, so a simulation decides as a server does.

- How long a step takes is learned online: seconds = a + b * tokens + c * requests (`StepTimes`).
- Who waits is ordered by predicted slack. Of the requests that can still be in time, the largest
  set that can be in time together is served first, earliest deadline first (Moore and Hodgson: when
  one would be late, the longest accepted one is put off). It is decided anew for every step.
- A step is no longer than the answers under way can bear: its prompt tokens are limited so that the
  answers' next tokens come within their tpot targets (SLOs-Serve, arXiv 2504.08784, budgets steps
  likewise). New ones are not admitted where their decoding alone would break the others' pace.
- Fillers (filler.py) are outside all this: they take what is left.
- Requests without targets, and those that are too late, are due `PATIENCE_S` after their arrival,
  and a priority p is due p seconds later. Until then they take what the others leave; from then on
  a share of the prompt tokens is theirs, the longest due first, so that no stream of urgent
  requests starves them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from tokenry.engine.limits import EngineLimits
from tokenry.engine.policy import Policy
from tokenry.engine.request import Request, Status
from tokenry.engine.step_times import StepTimes
from tokenry.plan import StepPlan

PATIENCE_S = 30.0
DUE_SHARE = 0.25
"""Share of the prompt tokens that goes to those who are due while others can be in time."""
MIN_PREFILL = 16
"""Prompt tokens that a step may have however little the answers can bear: they must end, too."""
_ARRANGED_PER_STEP = 256
"""Requests that may wait for each step between two arrangements of the queue."""
MARGIN = 0.9
"""Share of a predicted slack that is used: predictions err."""


class SLOPolicy(Policy):
    """Owned by Scheduler."""

    def __init__(self, limits: EngineLimits) -> None:
        super().__init__(limits)
        self.times = StepTimes()
        self._slo_queue = SLOQueue()
        self.queue = self._slo_queue
        self._launched_s: dict[int, float] = {}
        self._ended_s = -math.inf
        self._answer = _Mean(64.0)
        self._due_credit = 0.0
        self._now_s = 0.0
        self._first_deadline_s = math.inf

    # ---- what the scheduler asks -------------------------------------------------------------

    def begin(self, running: Sequence[Request], now_s: float) -> int:
        """Order who waits, by what can be in time now; tokens that the answers can bear."""
        self._now_s = now_s
        running = [r for r in running if not r.filler]
        busy = [r for r in running if r.num_pending or r.num_tokens > r.num_computed]
        num_running = len(busy)
        paces = [p for r in busy if (p := _tpot_s(r)) is not None]
        self._slo_queue.open = self._has_pace_for_one_more(num_running, paces)
        if self._slo_queue.order_is_stale():
            self._arrange(running, num_running)
        return self._budget(running, now_s)

    def order(self, running: Sequence[Request]) -> tuple[list[Request], int]:
        """Answers under way, then prompts by their deadline; those later than the first who waits
        come after him.
        """
        urgent = [r for r in running if not r.filler]
        decoding = [r for r in urgent if _decodes(r)]
        prompts = sorted((self._running_deadline(r), r.key, r) for r in urgent if not _decodes(r))
        before = [r for deadline, _, r in prompts if deadline <= self._first_deadline_s]
        after = [r for deadline, _, r in prompts if deadline > self._first_deadline_s]
        fillers = [r for r in running if r.filler]
        return [*decoding, *before, *after, *fillers], len(decoding) + len(before)

    def launched(self, plan: StepPlan, now_s: float) -> None:
        """Book the prompt tokens of those who were due and of the others."""
        self._launched_s[plan.step] = now_s
        by_id = self._slo_queue.admitted
        for new in plan.new:
            request = by_id.pop(new.request_id, None)
            if request is not None:
                count = len(request.tokens)
                was_due = now_s >= due_s(request)
                self._due_credit += -count * (1 - DUE_SHARE) if was_due else count * DUE_SHARE
        most = float(self._limits.max_num_batched_tokens)
        self._due_credit = max(-most, min(most, self._due_credit))

    def ended(self, plan: StepPlan, now_s: float) -> None:
        """Learn from the time between this step's begin, or the end of the one before, and now."""
        began_s = max(self._launched_s.pop(plan.step), self._ended_s)
        self._ended_s = now_s
        self.times.observe(plan.num_tokens, len(plan.rows), now_s - began_s)

    def answered(self, request: Request) -> None:
        """A request has ended by itself: how long answers are is learned, too."""
        self._answer.add(request.num_output)

    # ---- predictions -------------------------------------------------------------------------

    def _arrange(self, running: Sequence[Request], num_running: int) -> None:
        """Who is asked first, of all that wait."""
        due, hopeful, idle = [], [], []
        for request in self._slo_queue.waiting():
            deadline = None if request.filler else self._deadline(request)
            if (
                deadline is not None
                and self._now_s + self._prefill_s(request, num_running) <= deadline
            ):
                hopeful.append((deadline, request))
            elif self._now_s >= due_s(request):
                due.append(request)
            else:
                idle.append(request)
        hurried = [(d, r) for r in running if (d := self._hurry(r, num_running)) is not None]
        accepted, put_off = self._feasible([*hopeful, *hurried], num_running)
        due.sort(key=_due_key)
        idle.sort(key=_due_key)
        self._first_deadline_s = self._deadline(accepted[0]) or math.inf if accepted else math.inf
        first = [*due, *accepted] if self._due_credit > 0 else [*accepted, *due]
        self._slo_queue.set_order([*first, *put_off, *idle])

    def _budget(self, running: Sequence[Request], now_s: float) -> int:
        """Tokens that fit into the time that the answers under way leave."""
        most = self._limits.max_num_batched_tokens
        if not self._limits.chunked_prefill:
            return most  # a prompt comes whole or not at all
        decoding = [r for r in running if _decodes(r)]
        in_flight_s = self._in_flight_s(now_s)
        bearable_s = min(
            (self._slack_s(r, now_s + in_flight_s) for r in decoding), default=math.inf
        )
        if bearable_s == math.inf:
            return most
        fitting = self.times.tokens_within(bearable_s * MARGIN, len(decoding) + 1)
        return max(len(decoding) + MIN_PREFILL, min(most, fitting))

    def _feasible(
        self, hopeful: list[tuple[float, Request]], num_running: int
    ) -> tuple[list[Request], list[Request]]:
        """Of those who wait the largest set that can be in time together, and the others, both by
        deadline. Prompts under way take their time among them, and are not put off.
        """
        hopeful.sort(key=lambda pair: (pair[0], pair[1].key))
        end_s = self._now_s
        longest: list[tuple[float, int]] = []
        put_off: set[int] = set()
        for i, (deadline, request) in enumerate(hopeful):
            cost_s = self._prefill_s(request, num_running)
            end_s += cost_s
            if request.status is Status.WAITING:
                heapq.heappush(longest, (-cost_s, i))
            if end_s > deadline and longest:
                cost, out = heapq.heappop(longest)
                end_s += cost
                put_off.add(out)
        waiting = [(i, r) for i, (_, r) in enumerate(hopeful) if r.status is Status.WAITING]
        accepted = [r for i, r in waiting if i not in put_off]
        return accepted, [r for i, r in waiting if i in put_off]

    def _has_pace_for_one_more(self, num_running: int, paces: Iterable[float]) -> bool:
        """Whether one more answer leaves the others their pace; always where none runs."""
        tightest = min(paces, default=math.inf)
        step_s = self.times.seconds(num_running + 1 + MIN_PREFILL, num_running + 1)
        return num_running == 0 or step_s <= tightest

    def _prefill_s(self, request: Request, num_running: int) -> float:
        """Seconds that the request's prompt takes of steps that also carry the answers."""
        room = max(1, self._limits.max_num_batched_tokens - num_running)
        step_s = self.times.seconds(room + num_running, num_running + 1)
        return (len(request.tokens) - request.num_computed) / room * step_s

    def _hurry(self, request: Request, num_running: int) -> float | None:
        """The deadline of a running request's prompt, if it can still be kept."""
        deadline = None if _decodes(request) else self._deadline(request)
        if deadline is None or self._now_s + self._prefill_s(request, num_running) > deadline:
            return None
        return deadline

    def _deadline(self, request: Request) -> float | None:
        """When its next token must be there, None if it has no target for it."""
        params, times = request.params, []
        if request.num_output and params.tpot_target_ms is not None:
            times.append(request.first_token_s + request.num_output * params.tpot_target_ms / 1e3)
        if not request.num_output and params.ttft_target_ms is not None:
            times.append(request.queued_s + params.ttft_target_ms / 1e3)
        if params.deadline_ms is not None:
            left = min(request.max_len - len(request.tokens), self._answer.value)
            decode_s = max(0.0, left - 1) * max(self.times.seconds(1, 1), self.times.mean_s)
            times.append(request.queued_s + params.deadline_ms / 1e3 - decode_s)
        return min(times) if times else None

    def _running_deadline(self, request: Request) -> float:
        """Of a prompt under way: its deadline while it can be kept, else when it is due."""
        deadline = self._deadline(request)
        due = due_s(request)
        if deadline is None or self._now_s > deadline:
            return -math.inf if self._now_s >= due else due
        return deadline

    def _slack_s(self, request: Request, now_s: float) -> float:
        """Seconds until its next token must be there; of one that is behind, half its pace, so
        that it catches up and prompts still get on.
        """
        slack_s, pace_s = math.inf, _tpot_s(request)
        if pace_s is not None:
            count = request.num_output + request.num_pending
            slack_s = max(request.first_token_s + count * pace_s - now_s, pace_s / 2)
        if request.params.deadline_ms is not None:
            left_s = request.queued_s + request.params.deadline_ms / 1e3 - now_s
            left = max(1, request.max_len - request.num_tokens)
            slack_s = min(slack_s, left_s / left if left_s > 0 else math.inf)
        return slack_s

    def _in_flight_s(self, now_s: float) -> float:
        """Seconds that the steps in flight still take, as far as their mean tells."""
        if not self._launched_s:
            return 0.0
        began_s = max(min(self._launched_s.values()), self._ended_s)
        return max(0.0, self.times.mean_s * len(self._launched_s) - (now_s - began_s))


class SLOQueue:
    """Who waits, in the order that the policy gave at the step's begin. Owned by SLOPolicy.

    open   whether anybody may be admitted now.
    """

    def __init__(self) -> None:
        self.open = True
        self.admitted: dict[str, Request] = {}
        self._requests: dict[str, Request] = {}
        self._num_left = 0
        self._order: list[Request] = []
        self._next = self._num_steps = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._requests) - self._num_left

    def waiting(self) -> list[Request]:
        """All of them; those that ended where they waited are forgotten."""
        if self._num_left:
            waiting = self._requests.items()
            self._requests = {i: r for i, r in waiting if r.status is Status.WAITING}
            self._num_left = 0
        return list(self._requests.values())

    def order_is_stale(self) -> bool:
        """Whether to arrange anew: in every step, but in a long queue only after so many steps that
        a step's share of the work stays small.
        """
        self._num_steps += 1
        used_up = self._next >= len(self._order)
        return used_up or self._num_steps * _ARRANGED_PER_STEP >= len(self._requests)

    def set_order(self, order: list[Request]) -> None:
        """Who is asked first in this step; a token in flight must be known before a return."""
        self._order = [request for request in order if not request.num_pending]
        self._next = self._num_steps = 0

    def push(self, request: Request) -> None:
        """Take in a request whose status is WAITING; it is ordered from the next step on."""
        if request.request_id in self._requests:  # one of the same name, that has ended
            self._num_left -= 1
        self._requests[request.request_id] = request

    def head(self) -> Request | None:
        """Who is next."""
        if not self.open:
            return None
        while self._next < len(self._order):
            request = self._order[self._next]
            if request.status is Status.WAITING:
                return request
            self._next += 1
        return None

    def pop(self) -> None:
        """Take out the head, which is being admitted."""
        request = self._order[self._next]
        self._next += 1
        del self._requests[request.request_id]
        self.admitted[request.request_id] = request

    def note_left(self) -> None:
        """A request has ended where it waited."""
        self._num_left += 1


class _Mean:
    """A mean that forgets: each new value counts a twentieth."""

    def __init__(self, first: float) -> None:
        self.value = first

    def add(self, value: float) -> None:
        self.value += (value - self.value) / 20


def due_s(request: Request) -> float:
    """When a request that no target urges must be served; nothing ever urges a filler."""
    if request.filler:
        return math.inf
    return request.queued_s + PATIENCE_S + request.priority


def _due_key(request: Request) -> tuple[float, tuple[int, ...]]:
    return due_s(request), request.key


def _tpot_s(request: Request) -> float | None:
    target = request.params.tpot_target_ms
    return None if target is None else target / 1e3


def _decodes(request: Request) -> bool:
    """Whether its prompt is computed and its answer under way."""
    return request.num_output > 0 and request.num_tokens - request.num_computed <= 1


def make_policy(limits: EngineLimits) -> Policy:
    """The policy that the limits name."""
    return SLOPolicy(limits) if limits.policy == "slo" else Policy(limits)
