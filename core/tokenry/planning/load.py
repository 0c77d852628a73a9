"""A load as the launches that a device would make of it, recorded or generated.

In: steps from a file (`runner/step_log.py`), or the limits of an engine for which a mixed load is
made up. Out: how often each need occurs. No tensors, no device: the real scheduler runs the
generated load against a runner that answers anything.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tokenry.backend.contract import Caps
from tokenry.engine.core import EngineCore
from tokenry.engine.limits import EngineLimits
from tokenry.messages import AddRequest
from tokenry.params import SamplingParams
from tokenry.plan import RowResult, StepPlan, StepResult
from tokenry.runner.buckets import Need, need_of
from tokenry.runner.shapes import Extent, Share, split
from tokenry.runner.step_log import Step


def needs_of(steps: Iterable[Step], caps: Caps, extent: Extent) -> Counter[Need]:
    """How often each need comes when the device runs these steps. Steps beyond the extent (of a
    load recorded with larger limits) are cut to it.
    """
    assert extent.block_size is not None
    found: Counter[Need] = Counter()
    for step in steps:
        for part in _cut(step, extent):
            for launch in split(part, caps, extent):
                found[need_of(launch, extent.block_size)] += 1
    return found


def _cut(step: Step, extent: Extent) -> Iterable[list[Share]]:
    """The step as steps within the limits."""
    longest = extent.max_blocks * (extent.block_size or 1)
    part: list[Share] = []
    for share in step:
        count = min(share.count, extent.max_tokens, longest)
        start = min(share.start, longest - count)
        tokens = sum(s.count for s in part) + count
        if part and (len(part) == extent.max_seqs or tokens > extent.max_tokens):
            yield part
            part = []
        part.append(
            Share(row=len(part), start=start, count=count, sample=True, scored=share.scored)
        )
    yield part


# ---- a generated load ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guest:
    """One sort of request. median and spread of a lognormal, as shares of max_model_len."""

    share: float
    prompt: tuple[float, float]
    answer: tuple[float, float]


GUESTS = (
    Guest(0.60, (0.02, 0.9), (0.03, 0.7)),  # chat: short prompts, answers as long
    Guest(0.25, (0.20, 0.6), (0.01, 0.6)),  # documents: long prompts, short answers
    Guest(0.15, (0.005, 0.5), (0.10, 0.5)),  # writing: hardly a prompt, long answers
)
"""The mixed load: three sorts of requests in waves of arrivals."""
SHARED_PREFIX = 0.4
"""Share of chat and document requests that begin like an earlier one."""


def mixed_load(limits: EngineLimits, *, requests: int = 200, seed: int = 0) -> list[Step]:
    """Steps that the scheduler plans for a mixed load. The same for the same arguments."""
    runner = _Recorder()
    run_mixed_load(EngineCore(limits, runner), limits, requests=requests, seed=seed)
    return runner.steps


def run_mixed_load(
    core: EngineCore,
    limits: EngineLimits,
    *,
    requests: int = 200,
    seed: int = 0,
    vocab_size: int = 10**6,
) -> None:
    """Drive an engine to the end of a mixed load: arrivals in waves, three sorts of requests, some
    with a shared beginning.
    """
    rng = random.Random(seed)
    waiting = [_request(i, rng, limits, vocab_size) for i in range(requests)]
    at = 0
    while waiting or core.has_work():
        busy = (at // 300) % 2 == 0 or not core.has_work()
        rate = 0.3 if busy else 0.05
        while waiting and rng.random() < rate:
            core.add(waiting.pop())
        core.step()
        at += 1
    core.close()


def _request(i: int, rng: random.Random, limits: EngineLimits, vocab_size: int) -> AddRequest:
    guest = rng.choices(GUESTS, [g.share for g in GUESTS])[0]
    prompt, answer = (
        max(1, round(limits.max_model_len * share * rng.lognormvariate(0, spread)))
        for share, spread in (guest.prompt, guest.answer)
    )
    prompt = min(prompt, limits.max_model_len * 9 // 10)
    answer = min(answer, limits.max_model_len - prompt)
    shared = prompt // 2 if rng.random() < SHARED_PREFIX else 0
    common = (n % vocab_size for n in range(shared))
    rest = (rng.randrange(vocab_size) for _ in range(prompt - shared))
    return AddRequest(
        request_id=str(i),
        token_ids=(*common, *rest),
        params=SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True),
    )


class _Recorder:
    """A runner that notes the shapes of the plans and answers 0."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def run(self, plan: StepPlan) -> Callable[[], StepResult]:
        """The step's result, at once."""
        self.steps.append(
            tuple(
                Share(row=i, start=row.num_computed, count=row.num_new, sample=row.sample)
                for i, row in enumerate(plan.rows)
            )
        )
        rows = tuple(
            RowResult(request_id=row.request_id, token_ids=(0,) if row.sample else ())
            for row in plan.rows
        )
        return lambda: StepResult(step=plan.step, rows=rows)
