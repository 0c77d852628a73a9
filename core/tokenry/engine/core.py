"""The loop that joins scheduler and runner: one call is one step.

In: AddRequest, abort ids. Out: events. With overlap, the plan of step N+1 is made while step N runs
on the worker thread; without, a step is launched and waited for where it stands. Knows nothing of
tensors, text or processes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

from tokenry.engine.gate import Gate, Grammars
from tokenry.engine.limits import EngineLimits
from tokenry.engine.retreat import release_frames
from tokenry.engine.scheduler import Scheduler
from tokenry.errors import DeviceLost, DeviceOOM, Refusal, RequestError, TokenryError
from tokenry.messages import AddRequest, Stats, TokensEvent
from tokenry.plan import StepPlan, StepResult, StepRunner

log = logging.getLogger(__name__)
Waiter = Callable[[], StepResult]
Launched = Callable[[], Waiter]
"""Waits until the step is launched; raises what the launch raised."""
GATE_PATIENCE_S = 0.005
"""How long a step waits for a grammar where nothing else is to be done; commands wait as long."""


class EngineCore:
    """Owns the scheduler and the steps in flight. Not thread-safe: one thread calls it.

    grammars   compiles what answers are bound to; without it such requests are refused.
    clock      seconds; simulations bring their own.
    """

    def __init__(
        self,
        limits: EngineLimits,
        runner: StepRunner,
        grammars: Grammars | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._scheduler = Scheduler(limits, clock)
        self._runner = runner
        self._in_flight: deque[tuple[StepPlan, Launched]] = deque()
        self._gate = Gate(grammars)
        self._told: list[TokensEvent] = []
        self._worker = ThreadPoolExecutor(1, "tokenry-step") if limits.overlap else None

    def add(self, message: AddRequest) -> None:
        """Queue a request; one that can never run is answered with an error event of the next
        step.
        """
        try:
            if message.params.structured_outputs is not None:
                self._gate.add(message)
            else:
                self._scheduler.add(message)
        except RequestError as error:
            self._told.append(_refusal(message.request_id, error))

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests without an event; unknown ids are ignored."""
        request_ids = tuple(request_ids)
        self._scheduler.counters.aborted += self._gate.abort(request_ids)
        for request_id in request_ids:
            self._scheduler.abort(request_id)

    def step(self) -> list[TokensEvent]:
        """Plan and launch one step, take in the oldest one that is due; [] is no sign that the work
        is done.
        """
        self._let_in()
        plan = self._scheduler.schedule()
        if plan is not None:
            self._in_flight.append((plan, self._launch(plan)))
        depth = 1 if self._worker is not None and plan is not None else 0
        if len(self._in_flight) > depth:
            self._finish_oldest()
        elif plan is None and not self._told:
            self._gate.wait(GATE_PATIENCE_S)  # nothing else is to be done
        events = self._told + self._scheduler.take_events()
        self._told = []
        return events

    def has_work(self) -> bool:
        """Whether a step would do, or owes, something."""
        s = self._scheduler
        return bool(
            self._in_flight or self._told or s.num_running or s.num_waiting or len(self._gate)
        )

    def stats(self) -> Stats:
        """Counters and gauges of the scheduler (of the runner: see `assemble`)."""
        s, c = self._scheduler, self._scheduler.counters
        return Stats(
            num_running=s.num_running,
            num_prefilling=s.num_prefilling,
            num_waiting=s.num_waiting + len(self._gate),
            kv_usage=s.blocks.num_held / max(1, s.blocks.num_usable),
            num_blocks=s.blocks.num_blocks,
            num_preemptions=c.preemptions,
            prefix_cache_queries=c.prefix_queries,
            prefix_cache_hits=c.prefix_hits,
            prompt_tokens=c.prompt_tokens,
            generation_tokens=c.generation_tokens,
            steps=c.steps,
            step_failures=c.step_failures,
            num_requests_aborted=c.aborted,
            num_device_ooms=c.device_ooms,
        )

    def kv_waste(self) -> float:
        """Share of the held KV slots that hold no token."""
        return self._scheduler.kv_waste()

    def reset_prefix_cache(self) -> bool:
        """Forget the KV of earlier requests; True: it always can, running ones keep theirs."""
        self._scheduler.reset_prefix_cache()
        return True

    def check_integrity(self) -> None:
        """Raises if blocks and requests do not agree."""
        self._scheduler.check_integrity()

    def close(self) -> None:
        """Wait for the steps in flight and stop the worker thread."""
        while self._in_flight:
            with contextlib.suppress(DeviceLost):  # it was told when it was met first
                self._finish_oldest()
        if self._worker is not None:
            self._worker.shutdown()
        self._gate.close()

    def _let_in(self) -> None:
        """Requests whose grammar is compiled; each is told so, or what is wrong with it."""
        for passed in self._gate.take():
            request_id, outcome = passed.message.request_id, passed.matcher
            try:
                if isinstance(outcome, RequestError):
                    raise outcome
                self._scheduler.add(passed.message, outcome)
            except RequestError as error:
                self._told.append(_refusal(request_id, error))
            else:
                self._told.append(TokensEvent(request_id=request_id))

    def _launch(self, plan: StepPlan) -> Launched:
        if self._worker is not None:
            return self._worker.submit(self._runner.run, plan).result
        try:
            waiter = self._runner.run(plan)
        except Exception as error:  # whatever a step raises belongs to its requests: _finish_oldest
            return functools.partial(_throw, error)
        return lambda: waiter

    def _finish_oldest(self) -> None:
        """Wait for it and book what came; what failed belongs to its requests. Raises DeviceLost,
        with which the engine ends, and so do all requests.
        """
        plan, launched = self._in_flight.popleft()
        try:
            result = launched()()
        except DeviceLost:
            raise
        except DeviceOOM as error:  # it stays usable: the step is planned anew, and smaller
            release_frames(error)
            self._scheduler.retry(plan, error)
        except Exception as error:  # no request may end the engine: its requests get the cause
            log.error("step %d failed:\n%s", plan.step, "".join(traceback.format_exception(error)))
            known = isinstance(error, TokenryError)
            cause = str(error) if known else f"{type(error).__name__}: {error}"
            self._scheduler.fail(plan, f"The step failed: {cause}")
        except BaseException:  # an interrupt came first: the step is still in flight
            self._in_flight.appendleft((plan, launched))
            raise
        else:
            self._scheduler.update(plan, result)


def _throw(error: Exception) -> NoReturn:
    raise error


def _refusal(request_id: str, error: RequestError) -> TokensEvent:
    return TokensEvent(
        request_id=request_id,
        finish_reason="error",
        error=error.message,
        refusal=Refusal.of(error),
    )
