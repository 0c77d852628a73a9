"""Checks of `build_model` and `compile`: programs compute what the model computes, with whatever
values come after they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tokenry.backend.contract import Caps, HostBatch
from tokenry.conformance.attention import invariance_claimed
from tokenry.conformance.check import Case, Check, attempt, check
from tokenry.conformance.compare import same_bits
from tokenry.conformance.kit import Kit
from tokenry.conformance.scenes import Packed, Work, on_device
from tokenry.conformance.stepping import Stepper, texts_of
from tokenry.conformance.tiny import FAMILIES

LENGTH = 60


def makes_programs(caps: Caps) -> str | None:
    """Asked only where programs are captured or compiled."""
    return None if caps.graphs != "none" else "Caps.graphs is none: steps run as they are"


@check("C05.step", "A step gives the model's logits, alone, in company, and with padded rows.")
def step(kit: Kit) -> Iterator[Case]:
    """Three families of models (grouped heads; window and soft caps; experts): prompts of several
    lengths, one by one and together, then decode steps, without `compile`.
    """
    for family in FAMILIES:
        stepper = Stepper(kit, texts_of(4, LENGTH), compiled=False, family=family)
        lengths = (1, 15, 17, 40)
        for i, n in enumerate(lengths):
            yield attempt(f"{family}: prompt of {n}", stepper.go, [Work(i, 0, n)])
        for at in range(3):
            works = [Work(i, n + at, 1) for i, n in enumerate(lengths)]
            yield attempt(
                f"{family}: decode step {at}",
                stepper.go,
                works,
                spare=at == 2,
            )
        if kit.caps.phases.chunked:
            works = [Work(i, n + 3, 11) for i, n in enumerate(lengths)]
            yield attempt(f"{family}: 11 more each", stepper.go, works)


@check(
    "C08.replay",
    "A program computes from the values that it is given now, not from those it was made with.",
    asked=makes_programs,
)
def replay(kit: Kit) -> Iterator[Case]:
    """Programs are made with one batch, then run on others of the same lengths with other tokens
    and blocks, in new tensors each time, back and forth and with a second bucket in between; the
    logits are the model's every time.
    """
    stepper = Stepper(kit, texts_of(8, LENGTH))

    def first(packed: Packed) -> HostBatch:
        return packed.host

    yield attempt("prompts", lambda: stepper.prompts(range(8), 20))
    groups = {"A": (0, 1, 2, 3), "B": (4, 5, 6, 7), "C": (6, 0, 3, 5)}
    for name in ("A", "B", "A", "C", "B"):
        works = [Work(r, 20, 1) for r in groups[name]]
        yield attempt(f"decode of batch {name}", stepper.go, works, example=first)
        lone = [Work(groups[name][0], 21, 1)]
        yield attempt(
            f"decode of one request of {name} in between",
            stepper.go,
            lone,
            example=first,
        )
    for request in (0, 5, 0, 7):
        yield attempt(
            f"prompt of request {request} again",
            stepper.go,
            [Work(request, 0, 20)],
            example=first,
        )


@check(
    "C09.scalars",
    "A program depends on no value but its bucket: lengths, positions and slots may change.",
    asked=makes_programs,
)
def scalars(kit: Kit) -> Iterator[Case]:
    """Programs are made with the blank batch of the warm-up, then run with short and long contexts,
    full and padded batches; the logits are the model's, and compile_count stands still.
    """
    stepper = Stepper(kit, texts_of(4, LENGTH), seed=3)
    yield attempt("prompts", lambda: stepper.prompts(range(4), 8))
    for width in ((0, 1, 2, 3), (1, 2, 3), (0, 3, 2)):
        works = [Work(r, 8, 1) for r in width]
        yield attempt(f"decode of {len(width)}", stepper.go, works)
    made = stepper.backend.compile_count()
    known = set(stepper.programs)
    for at in (*range(9, LENGTH - 1), 9, 31, LENGTH - 2, 10):
        works = [Work(r, at if r % 2 else min(at, 9 + at // 2), 1) for r in (0, 1, 2, 3)]
        yield attempt(f"decode at {at}", stepper.go, works)
    new = len(set(stepper.programs) - known)

    def count() -> str | None:
        grown = stepper.backend.compile_count() - made
        return None if grown <= new else f"{grown} programs were made for {new} new buckets"

    yield attempt("compile_count", count)


HOST_READS = frozenset(
    {"item", "tolist", "numpy", "nonzero", "is_nonzero", "equal", "allclose", "cpu",
     "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"}
)  # fmt: skip
DISPATCHED_READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")


class Calls(TorchFunctionMode):
    """Remembers the calls that read a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note and go on."""
        name = getattr(func, "__name__", "")
        if name in HOST_READS:
            self.found.append(f"{name}()")
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's hook of classes
    """Remembers the operators that read a value on the host, or move one there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note and go on."""
        kwargs = kwargs or {}
        name = func._schema.name
        target = kwargs.get("device")
        moves = name == "aten::_to_copy" and target is not None and target.type == "cpu"
        if name in DISPATCHED_READS or (moves and args[0].device.type != "cpu"):
            self.found.append(name)
        return func(*args, **kwargs)


def can_wait(caps: Caps) -> str | None:
    """Asked where the host could wait for a device."""
    if caps.input_device != "cpu" or caps.graphs != "none":
        return None
    return "steps run on the host, where no read waits"


@check("C15.sync", "A step reads no value on the host.", asked=can_wait)
def sync(kit: Kit) -> Iterator[Case]:
    """A prompt and a decode step of each family, as `build_model` gave it, with every call that
    shows a value to the host recorded.
    """
    for family in FAMILIES:
        stepper = Stepper(kit, texts_of(3, LENGTH), compiled=False, family=family)
        for name, works in (
            ("prompt", [Work(0, 0, 20)]),
            ("second prompt", [Work(1, 0, 33)]),
            ("decode", [Work(0, 20, 1), Work(1, 33, 1)]),
        ):
            for packed in stepper.scene.launches(works):
                yield attempt(
                    f"{family}: {name} in {packed.host.bucket}",
                    _reads,
                    stepper,
                    packed,
                )


def _reads(stepper: Stepper, packed: Packed) -> str | None:
    batch = on_device(packed.host, stepper.backend)
    calls, dispatched = Calls(), Dispatched()
    with torch.inference_mode(), calls, dispatched:
        stepper.step(batch)
    found = calls.found + dispatched.found
    if not found:
        return None
    return f"{len(found)} reads on the host: {', '.join(sorted(set(found)))}"


@check(
    "C07.step",
    "The bits of a request's logits depend neither on the other requests nor on chunking.",
    asked=invariance_claimed,
)
def invariance(kit: Kit) -> Iterator[Case]:
    """Texts of four lengths whole and alone, in one batch, in chunks of 7, and token by token."""
    lengths = (15, 40, 16, 59)
    stepper = Stepper(kit, texts_of(4, LENGTH))

    def logits(works: list[Work]) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for packed in stepper.scene.launches(works):
            for work, row in zip(packed.works, stepper.run(packed), strict=True):
                found[work.request] = row
        return found

    alone: dict[int, Any] = {}
    for i, n in enumerate(lengths):
        alone |= logits([Work(i, 0, n)])

    def same(how: Callable[[], dict[int, Any]]) -> str | None:
        got = how()
        for i in range(4):
            wrong = same_bits(np.asarray(got[i]), np.asarray(alone[i]))
            if wrong is not None:
                return f"request {i} of {lengths[i]} tokens: {wrong}"
        return None

    def chunks(size: int) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for at in range(0, max(lengths), size):
            works = [Work(i, at, min(size, n - at)) for i, n in enumerate(lengths) if at < n]
            found |= logits(works)
        return found

    yield attempt(
        "together", lambda: same(lambda: logits([Work(i, 0, n) for i, n in enumerate(lengths)]))
    )
    if kit.caps.phases.chunked:
        yield attempt("in chunks of 7", lambda: same(lambda: chunks(7)))
        yield attempt("in chunks of 16", lambda: same(lambda: chunks(16)))
    yield attempt("token by token", lambda: same(lambda: chunks(1)))


CHECKS: tuple[Check, ...] = (step, replay, scalars, sync, invariance)
