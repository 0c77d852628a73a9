"""Checks of memory: what the device says it has, what KV takes, the plan and its end.

Sizes are counted in bytes, never in time. A device may be used by others meanwhile, so small
differences (`SLACK`) are no finding.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator

import torch

from tokenry.backend.base import KV, Backend
from tokenry.backend.contract import Caps, KVPlan, KVSpec
from tokenry.conformance.attention import trial
from tokenry.conformance.check import Case, Check, attempt, check
from tokenry.conformance.kit import Kit
from tokenry.conformance.paged import AttentionCase, fetched, tensors_in
from tokenry.errors import DeviceOOM, TokenryError

MIB = 2**20
KV_BYTES = 96 * MIB
SLACK = 24 * MIB
LEDGER = ("weights", "activations", "programs", "margin", "kv")


def spec_of(caps: Caps, *, layers: int = 2, dtype: str | None = None) -> KVSpec:
    """A KV whose blocks are a few dozen KiB."""
    return KVSpec(
        num_layers=layers,
        num_kv_heads=4,
        head_dim=64,
        block_size=caps.block_sizes[0],
        dtype=dtype or caps.dtypes[0],
    )


def touch(kv: KV, value: float) -> int:
    """Write every element, so that the memory is really taken; the number of tensors found."""
    found = [t for layer in kv for t in tensors_in(layer)]
    with torch.inference_mode():
        for tensor in found:
            tensor.fill_(value)
    return len(found)


def used(backend: Backend) -> int:
    """Bytes in use once everything asked for is done and everything dropped is gone."""
    gc.collect()
    backend.synchronize()
    return backend.memory().used


@check("C12.facts", "memory() gives bytes that can be true.")
def facts(kit: Kit) -> Iterator[Case]:
    """Total above 0, used and free within it, all whole numbers; twice in a row nearly the same."""
    backend = kit.open()

    def true() -> str | None:
        now = backend.memory()
        for name in ("total", "free", "used"):
            value = getattr(now, name)
            if type(value) is not int or value < 0:
                return f"{name} is {value!r}, not a whole number of bytes"
        if not now.total or now.free > now.total or now.used > now.total:
            return f"total {now.total}, free {now.free}, used {now.used}"
        again = backend.memory()
        if again.total != now.total or abs(again.used - now.used) > SLACK:
            return f"a moment later: {again} instead of {now}"
        return None

    yield attempt("memory()", true)


@check("C12.kv", "memory() moves with the KV, and what is given back can be taken again.")
def moves(kit: Kit) -> Iterator[Case]:
    """96 MiB of KV are taken and written: used grows by as much (2 % or 24 MiB of difference are
    no finding), free shrinks. They are dropped and taken again: used is no higher than before.
    """
    backend = kit.open()
    spec = spec_of(kit.caps)
    count = KV_BYTES // spec.block_bytes
    before = used(backend)
    free_before = backend.memory().free
    kv = backend.alloc_kv(spec, count)
    touch(kv, 1.0)
    after = used(backend)
    free_after = backend.memory().free
    size = count * spec.block_bytes
    allowed = max(SLACK, size // 50)
    grown = after - before

    def close(change: int, what: str) -> str | None:
        if abs(change - size) <= allowed:
            return None
        return f"{size} bytes of KV were taken and written, {what} by {change}"

    yield attempt("used grows by the KV", lambda: close(grown, "used grew"))
    if kit.caps.input_device != "cpu" or kit.simulated:  # the host's memory has other users
        shrunk = free_before - free_after
        yield attempt("free shrinks by the KV", lambda: close(shrunk, "free shrank"))
    del kv
    kv = backend.alloc_kv(spec, count)
    touch(kv, 1.0)
    leaked = used(backend) - after
    del kv
    yield attempt(
        "taken again after it was dropped",
        lambda: None if leaked <= allowed else f"used is {leaked} bytes higher than the first time",
    )


@check("C12.plan", "plan_kv stays within the budget, and its ledger adds up.")
def plan(kit: Kit) -> Iterator[Case]:
    """Budgets of 0.2 to 0.9 of the device, and 256 MiB above what is used: no entry of the ledger
    below 0, their sum within the budget, its kv the bytes of the blocks; a larger budget never
    gives fewer blocks; the blocks of the smallest plan can be taken.
    """
    backend = kit.open()
    spec = spec_of(kit.caps)
    now = backend.memory()
    small = min(now.used + 256 * MIB, now.total)
    budgets = sorted({small, *(int(now.total * f) for f in (0.2, 0.5, 0.9))})
    plans: list[KVPlan] = []
    for budget in budgets:
        yield attempt(f"budget {budget}", _adds_up, backend, spec, budget, plans)
    blocks = [p.num_blocks for p in plans]
    shrinks = any(b < a - SLACK // spec.block_bytes for a, b in itertools.pairwise(blocks))
    yield attempt(
        "a larger budget gives no fewer blocks",
        lambda: f"{budgets} gave {blocks} blocks" if shrinks else None,
    )
    count = plans[budgets.index(small)].num_blocks if len(plans) == len(budgets) else 0
    yield attempt(f"{count} planned blocks can be taken", lambda: _taken(backend, spec, count))


def _adds_up(backend: Backend, spec: KVSpec, budget: int, plans: list[KVPlan]) -> str | None:
    made = backend.plan_kv(spec, budget, None)
    plans.append(made)
    ledger = dict(made.ledger)
    if made.num_blocks < 0 or any(value < 0 for value in ledger.values()):
        return f"below 0: {made.num_blocks} blocks, {ledger}"
    if unknown := set(ledger) - set(LEDGER):
        return f"the ledger has {sorted(unknown)}; known: {', '.join(LEDGER)}"
    if ledger.get("kv") != made.num_blocks * spec.block_bytes:
        return f"{made.num_blocks} blocks of {spec.block_bytes} bytes, but kv is {ledger.get('kv')}"
    total = sum(ledger.values())
    if made.num_blocks and total > budget * 1.03:
        return f"the ledger adds up to {total} bytes, the budget is {budget}: {ledger}"
    return None


def _taken(backend: Backend, spec: KVSpec, count: int) -> str | None:
    kv = backend.alloc_kv(spec, count)
    return None if len(kv) == spec.num_layers else f"alloc_kv gave {len(kv)} layers"


@check("C13.oom", "Too much KV is a DeviceOOM, and the device stays usable.")
def oom(kit: Kit) -> Iterator[Case]:
    """Four times the whole device is asked for, twice: DeviceOOM with a mend each time, no memory
    lost, and attention still gives the right numbers.
    """
    backend = kit.open()
    spec = spec_of(kit.caps)
    before = used(backend)
    count = 4 * backend.memory().total // spec.block_bytes

    def refused() -> str | None:
        try:
            backend.alloc_kv(spec, count)
        except DeviceOOM as error:
            return None if error.mend else f"DeviceOOM without a mend: {error.message}"
        return f"{count} blocks ({count * spec.block_bytes} bytes) were granted"

    for turn in ("first", "second"):
        yield attempt(f"{turn} time", refused)
    lost = used(backend) - before
    yield attempt(
        "memory afterwards", lambda: f"{lost} bytes more in use" if lost > SLACK else None
    )
    case = AttentionCase(works=((0, 20),), dtype=kit.dtype, block_size=kit.caps.block_sizes[0])
    fresh = kit.open() if kit.caps.kv_baked else backend
    yield attempt("attention afterwards", lambda: trial(fresh, case))


def baked(caps: Caps) -> str | None:
    """Asked where programs depend on the number of blocks."""
    return None if caps.kv_baked else "Caps.kv_baked is not set"


@check(
    "C14.plan",
    "Where programs depend on the KV, plan_kv is a function of its arguments.",
    asked=baked,
)
def planned_twice(kit: Kit) -> Iterator[Case]:
    """The same plan from one backend twice, from a second one, and with KV in use."""
    first, second = kit.open(), kit.open()
    spec = spec_of(kit.caps)
    for budget in (2**28, 2**30, 3 * 2**33):
        want = first.plan_kv(spec, budget, None)

        def same(backend: Backend, want: KVPlan = want, budget: int = budget) -> str | None:
            got = backend.plan_kv(spec, budget, None)
            if (got.num_blocks, dict(got.ledger)) == (want.num_blocks, dict(want.ledger)):
                return None
            return f"{got.num_blocks} blocks, {want.num_blocks} before"

        yield attempt(f"budget {budget}, again", same, first)
        yield attempt(f"budget {budget}, another backend", same, second)
        held = second.alloc_kv(spec, 64)
        yield attempt(f"budget {budget}, with KV in use", same, second)
        del held


@check("C24.zeroed", "alloc_kv gives zeros, also where others wrote before.")
def zeroed(kit: Kit) -> Iterator[Case]:
    """KV is filled, dropped and taken again, for each dtype and block size: every element is 0."""
    backend = kit.open()
    for dtype in kit.caps.dtypes:
        for size in kit.caps.block_sizes:
            spec = KVSpec(num_layers=2, num_kv_heads=1, head_dim=32, block_size=size, dtype=dtype)
            yield attempt(
                f"KV {dtype}, 9 blocks of {size}",
                _zeros,
                kit.open() if kit.caps.kv_baked else backend,
                spec,
            )


def _zeros(backend: Backend, spec: KVSpec) -> str | None:
    for count in (9, 9):
        kv = backend.alloc_kv(spec, count)
        for i, layer in enumerate(kv):
            for tensor in tensors_in(layer):
                bad = int((fetched(backend, tensor) != 0).sum())
                if bad:
                    return f"{bad} of {tensor.numel()} elements of layer {i} are not 0"
        touch(kv, 3.0)
        del kv, layer, tensor
    return None


@check("C13.refusals", "What alloc_kv and plan_kv cannot do is a typed error or 0 blocks.")
def refusals(kit: Kit) -> Iterator[Case]:
    """A budget of 0 and of 1 byte: no blocks, or an error of tokenry with a mend."""
    backend = kit.open()
    for budget in (0, 1):
        yield attempt(f"budget {budget}", _nothing, kit, backend, budget)


def _nothing(kit: Kit, backend: Backend, budget: int) -> str | None:
    try:
        made = backend.plan_kv(spec_of(kit.caps), budget, None)
    except TokenryError:
        return None
    return None if made.num_blocks == 0 else f"{made.num_blocks} blocks in {budget} bytes"


CHECKS: tuple[Check, ...] = (facts, moves, plan, refusals, oom, planned_twice, zeroed)
