"""What goes wrong in a step, in the core's words, wherever in the step it was met.

In: a runner's `run`. Out: the same, with DeviceOOM for what torch, numpy or Python raise where
there is no memory, and DeviceLost where the device cannot go on. What a backend met itself is typed
already; this is for what the runner does beside it: the copy of the inputs, the sampler, the
scores. An error of the device is often told by the first call after it, whichever that is.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from tokenry.backend.base import Backend
from tokenry.errors import DeviceLost, DeviceOOM, TokenryError
from tokenry.plan import StepPlan, StepResult

HOST_ALLOCATOR = "DefaultCPUAllocator"
"""Names itself in a plain RuntimeError (torch, c10/core/impl/alloc_cpu.cpp)."""
Waiter = Callable[[], StepResult]


class _Runner(Protocol):
    @property
    def _backend(self) -> Backend:
        """The device."""


R = TypeVar("R", bound=_Runner)


def typed_steps(run: Callable[[R, StepPlan], Waiter]) -> Callable[[R, StepPlan], Waiter]:
    """`run`, and the waiter that it gives, raise DeviceOOM and DeviceLost."""

    @functools.wraps(run)
    def typed(runner: R, plan: StepPlan) -> Waiter:
        try:
            wait = run(runner, plan)
        except Exception as error:
            _check(plan, runner._backend, error)
            raise

        def result() -> StepResult:
            try:
                return wait()
            except Exception as error:
                _check(plan, runner._backend, error)
                raise

        return result

    return typed


def _check(plan: StepPlan, backend: Backend, error: Exception) -> None:
    """Raises what the error is in the core's words, if it has any for it."""
    if isinstance(error, TokenryError):
        return
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        raise _oom(plan, error) from error
    if isinstance(error, RuntimeError):
        if HOST_ALLOCATOR in str(error):
            raise _oom(plan, error) from error
        _check_device(plan, backend, error)


def _check_device(plan: StepPlan, backend: Backend, error: Exception) -> None:
    """Raises DeviceLost if the device cannot even be waited for after this error."""
    try:
        backend.synchronize()
    except DeviceLost as lost:
        raise lost from error
    except Exception as again:  # of whatever kind: it tells that every later step would fail
        raise DeviceLost(
            f"The device failed in step {plan.step} ({_first_line(error)}) and does not answer any "
            f"more ({type(again).__name__}: {_first_line(again)}).",
            mend="restart; the driver's log has more",
        ) from error


def _oom(plan: StepPlan, error: Exception) -> DeviceOOM:
    traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step
    return DeviceOOM(
        f"No memory for step {plan.step} of {len(plan.rows)} requests and {plan.num_tokens} "
        f"tokens: {_first_line(error)}",
        mend="--max-num-batched-tokens, --max-num-seqs or --memory-fraction lower",
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
