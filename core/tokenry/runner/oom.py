"""A step without memory, in the core's words, wherever in the step it was found.

In: a runner's `run`. Out: the same, with DeviceOOM for what torch, numpy or Python raise where
there is no memory. What a backend found itself is typed already; this is for what the runner does
beside it: the copy of the inputs, the sampler, the scores.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from tokenry.errors import DeviceOOM
from tokenry.plan import StepPlan, StepResult

HOST_ALLOCATOR = "DefaultCPUAllocator"
"""Names itself in a plain RuntimeError (torch, c10/core/impl/alloc_cpu.cpp)."""
Waiter = Callable[[], StepResult]
R = TypeVar("R")


def typed_oom(run: Callable[[R, StepPlan], Waiter]) -> Callable[[R, StepPlan], Waiter]:
    """`run`, and the waiter that it gives, raise DeviceOOM."""

    @functools.wraps(run)
    def typed(runner: R, plan: StepPlan) -> Waiter:
        with _typed(plan):
            wait = run(runner, plan)

        def result() -> StepResult:
            with _typed(plan):
                return wait()

        return result

    return typed


@contextmanager
def _typed(plan: StepPlan) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _oom(plan, error) from error
    except RuntimeError as error:
        if HOST_ALLOCATOR not in str(error):
            raise
        raise _oom(plan, error) from error


def _oom(plan: StepPlan, error: Exception) -> DeviceOOM:
    traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step
    cause = str(error).partition("\n")[0]
    return DeviceOOM(
        f"No memory for step {plan.step} of {len(plan.rows)} requests and {plan.num_tokens} "
        f"tokens: {cause}",
        mend="--max-num-batched-tokens, --max-num-seqs or --memory-fraction lower",
    )
