"""In which order requests are served, and how large a step may be: what scheduling policies decide.

In: the requests that wait and run, and when steps begin and end. Out: keys, an order, a budget. The
Scheduler does what it says; this file knows no blocks. `fcfs` and `priority` are one policy that
differs in its key; slo.py has the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tokenry.engine.filler import LATE, num_urgent
from tokenry.engine.limits import EngineLimits
from tokenry.engine.request import Request
from tokenry.engine.waiting import WaitingQueue
from tokenry.plan import StepPlan

AGING_STEPS = 256


class Queue(Protocol):
    """Requests that wait."""

    def __len__(self) -> int:
        """How many."""
        ...

    def push(self, request: Request) -> None:
        """Take in a request whose status is WAITING."""
        ...

    def head(self) -> Request | None:
        """Who is next, it stays; None: nobody may be admitted now."""
        ...

    def pop(self) -> None:
        """Take out the head, which is being admitted."""
        ...

    def note_left(self) -> None:
        """A request has ended where it waited: its status says so."""
        ...


class Policy:
    """First come, first served; with priorities a key that a bounded number of steps outweighs.

    The smallest key goes first. Under `priority` it is priority * AGING_STEPS + the step of
    arrival: a request of priority p waits like one that arrived p * AGING_STEPS steps later, so an
    endless stream of more urgent requests delays it by a bounded number of steps and never starves
    it.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self.queue: Queue = WaitingQueue()

    def urgency(self, priority: int, step: int, *, filler: bool = False) -> int:
        """First part of a request's key; its arrival is the second."""
        aged = priority * AGING_STEPS + step if self._limits.policy == "priority" else 0
        return aged + LATE if filler else aged

    def begin(self, running: Sequence[Request], now_s: float) -> int:
        """A step is being planned: most tokens that it may have."""
        return self._limits.max_num_batched_tokens

    def order(self, running: Sequence[Request]) -> tuple[list[Request], int]:
        """Running requests, the most urgent first, and how many of them go before those that wait:
        no filler does. Who is last gives up its blocks first.
        """
        return list(running), num_urgent(running)

    def launched(self, plan: StepPlan, now_s: float) -> None:
        """The plan was made and is about to run."""

    def ended(self, plan: StepPlan, now_s: float) -> None:
        """Its result is here, or it failed."""

    def answered(self, request: Request) -> None:
        """A request has ended by itself."""
