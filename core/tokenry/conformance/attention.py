"""Checks of the attention op and of the KV it writes.

Each case puts requests into shuffled blocks that hold garbage elsewhere, launches the op once in a
bucket that the core would use, and compares the live rows with dense attention in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tokenry.backend.base import Backend
from tokenry.backend.contract import Caps
from tokenry.conformance.check import Case, Check, attempt, check
from tokenry.conformance.compare import difference, same_bits
from tokenry.conformance.kit import Kit
from tokenry.conformance.paged import AttentionCase, Paged
from tokenry.conformance.scenes import Work

Rows = tuple[tuple[int, int], ...]
Bits = dict[tuple[int, int], NDArray[np.float64]]
"""(request, position) -> its row of the result."""


def rows_of(caps: Caps, block: int) -> dict[str, Rows]:
    """(cached, new) around the edges of blocks, by the phase that they belong to."""
    b = block
    found: dict[str, Rows] = {
        "decode": ((1, 1), (b - 1, 1), (b, 1), (b + 1, 1), (2 * b - 1, 1), (3 * b + 5, 1)),
        "prefill": ((0, 2), (0, b - 1), (0, b), (0, b + 1), (0, 2 * b), (0, 2 * b + 3)),
    }
    if caps.phases.chunked:
        found["chunk"] = ((b - 1, 2), (b, b), (b + 1, 5), (3, b), (2 * b - 1, b + 1))
        if caps.phases.mixed:
            found["mixed"] = ((0, b + 1), (b, 1), (b - 1, 3), (2 * b, 1), (0, 1), (3, 2 * b))
    return found


def mixture(caps: Caps, block: int) -> Rows:
    """A bit of everything that the device has."""
    rows = rows_of(caps, block)
    return rows.get("mixed") or (*rows["prefill"][1:4], *rows["decode"][1:4])


def trial(backend: Backend, case: AttentionCase) -> str | None:
    """What was wrong with the numbers."""
    tried = Paged(backend, case).run()
    for got, want in zip(tried.got, tried.want, strict=True):
        wrong = difference(got, want, case.dtype)
        if wrong is not None:
            return wrong
    return None


def tried(backend: Backend, case: AttentionCase) -> Case:
    """The case with its outcome."""
    return attempt(str(case), lambda: trial(backend, case))


@check(
    "C03.attention",
    "Attention is causal over each request's own blocks, for every phase, dtype, head layout and "
    "block size that the device claims.",
)
def numbers(kit: Kit) -> Iterator[Case]:
    """Live rows against dense attention in float64: decode, prefill, continued prompts and mixed
    batches with lengths around the edges of blocks; plain, grouped and single KV heads; every dtype
    and block size of the Caps; q, k, v as views of one product.
    """
    backend, caps = kit.open(), kit.caps
    block = caps.block_sizes[0]
    base = AttentionCase(works=((0, 1),), dtype=kit.dtype, block_size=block)
    for works in rows_of(caps, block).values():
        yield tried(backend, replace(base, works=works))
    for dtype in caps.dtypes:
        for works in (mixture(caps, block), rows_of(caps, block)["decode"]):
            yield tried(backend, replace(base, works=works, dtype=dtype, seed=1))
    for heads, kv_heads, dim in ((4, 4, 16), (6, 2, 64), (8, 1, 32), (5, 5, 80), (4, 2, 128)):
        works = mixture(caps, block)
        case = replace(base, works=works, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
        yield tried(backend, case)
    for size in caps.block_sizes[1:]:
        yield tried(backend, replace(base, works=mixture(caps, size), block_size=size))


@check(
    "C03.window",
    "A window of w sees the w most recent tokens, the row's own among them, and a soft cap bounds "
    "scores before the softmax.",
)
def options(kit: Kit) -> Iterator[Case]:
    """As C03.attention, with windows of 1, of one block, one more, and longer than any text; with
    soft caps; and with both. What `supports` refuses must work through the reference.
    """
    backend, caps = kit.open(), kit.caps
    block = caps.block_sizes[0]
    base = AttentionCase(works=((0, 1),), dtype=kit.dtype, block_size=block)
    for works in rows_of(caps, block).values():
        for window in (1, 5, block, block + 1, 40 * block):
            yield tried(backend, replace(base, works=works, window=window))
        for softcap in (1.0, 30.0):
            yield tried(backend, replace(base, works=works, softcap=softcap))
        yield tried(backend, replace(base, works=works, softcap=2.0, window=block + 2))


@check(
    "C04.slots", "The attention op writes keys and values to the slots of live rows, nowhere else."
)
def slots(kit: Kit) -> Iterator[Case]:
    """The whole KV before and after a launch, bit for bit, in exact and in padded buckets: only the
    slots of live rows and the null block (where padded rows go) may differ.
    """
    backend, caps = kit.open(), kit.caps
    block = caps.block_sizes[0]
    dim = 64 if block != 64 else 32
    base = AttentionCase(
        works=((0, 1),), dtype=kit.dtype, block_size=block, head_dim=dim, num_blocks=29
    )
    for name, works in rows_of(caps, block).items():
        for spare in (False, True):
            case = replace(base, works=works, spare=spare)
            yield attempt(
                f"{name}: {case}",
                _stray,
                backend,
                case,
            )


def _stray(backend: Backend, case: AttentionCase) -> str | None:
    return next(iter(Paged(backend, case).run(watch=True).stray), None)


@check("C04.written", "What was written is there for the next step, and for nobody else's.")
def written(kit: Kit) -> Iterator[Case]:
    """Requests in neighbouring blocks grow token by token; after each step every request's next
    row is compared with dense attention, so a stray write shows in the request that it hit.
    """
    backend, caps = kit.open(), kit.caps
    block = caps.block_sizes[0]
    lengths = (block - 2, block, 2 * block - 1)
    case = AttentionCase(
        works=tuple((0, n + 4) for n in lengths), dtype=kit.dtype, block_size=block
    )
    paged = Paged(backend, case)

    def step(works: list[Work]) -> str | None:
        for packed in paged.scene.launches(works):
            wrong = difference(paged.launch(packed), paged.expected(packed), case.dtype)
            if wrong is not None:
                return wrong
        return None

    yield attempt("prompts", lambda: step([Work(i, 0, n) for i, n in enumerate(lengths)]))
    for at in range(4):
        works = [Work(i, n + at, 1) for i, n in enumerate(lengths)]
        yield attempt(f"decode step {at + 1}: {case}", step, works)


@check("C05.padding", "Padded rows and the null block's contents change no live row.")
def padding(kit: Kit) -> Iterator[Case]:
    """The same rows in every bucket that covers them, padded rows filled with garbage and the null
    block with plus and minus 1e3: live rows equal the dense answer each time.
    """
    backend, caps = kit.open(), kit.caps
    block = caps.block_sizes[0]
    for name, works in rows_of(caps, block).items():
        for garbage in (1e3, -1e3):
            case = AttentionCase(
                works=works[:3], dtype=kit.dtype, block_size=block, garbage=garbage, spare=True
            )
            yield attempt(f"{name}, null block {garbage:g}: {case}", _covered, backend, case)


def _covered(backend: Backend, case: AttentionCase) -> str | None:
    paged = Paged(backend, case)
    paged.run()
    works = [Work(i, c, n) for i, (c, n) in enumerate(case.works)]
    for packed in paged.scene.covering(works):
        wrong = difference(paged.launch(packed), paged.expected(packed), case.dtype)
        if wrong is not None:
            return f"in {packed.host.bucket}: {wrong}"
    return None


@check(
    "C06.nan",
    "NaN in blocks and slots that a request does not own reaches no row of it.",
    must=False,
)
def poison(kit: Kit) -> Iterator[Case]:
    """As C03.attention, with NaN in every slot that was not written. Good to have: a request whose
    numbers broke leaves NaN in the blocks that it frees.
    """
    backend, caps = kit.open(), kit.caps
    block = caps.block_sizes[0]
    for works in rows_of(caps, block).values():
        for window in (None, block - 3):
            yield tried(
                backend,
                AttentionCase(
                    works=works, dtype=kit.dtype, block_size=block, window=window,
                    garbage=float("nan"), num_blocks=37, head_dim=64 if block != 64 else 32,
                ),
            )  # fmt: skip


def invariance_claimed(caps: Caps) -> str | None:
    """Asked only where it is claimed."""
    return None if caps.batch_invariant else "Caps.batch_invariant is not claimed"


@check(
    "C07.attention",
    "The bits of a row of attention depend neither on the other rows nor on chunking.",
    asked=invariance_claimed,
)
def invariance(kit: Kit) -> Iterator[Case]:
    """Each request whole and alone, then in batches, in parts and in single tokens."""
    backend, caps = kit.open(), kit.caps
    block = caps.block_sizes[0]
    lengths = (block - 1, 2 * block + 3, 5, 7 * block + 1)
    for dtype in caps.dtypes:
        case = AttentionCase(
            works=tuple((0, n) for n in lengths), dtype=dtype, block_size=block, head_dim=64
        )
        paged = Paged(backend, case)

        def rows(works: list[Work], paged: Paged = paged) -> Bits:
            found: Bits = {}
            for packed in paged.scene.launches(works):
                found.update(zip(packed.owners, paged.launch(packed), strict=True))
            return found

        whole: Bits = {}
        for i, n in enumerate(lengths):
            whole |= rows([Work(i, 0, n)])
        batches = {
            "all together": [Work(i, 0, n) for i, n in enumerate(lengths)],
            "last tokens together": [Work(i, n - 1, 1) for i, n in enumerate(lengths)],
            "second halves together": [Work(i, n // 2, n - n // 2) for i, n in enumerate(lengths)],
            "one token alone": [Work(3, 7 * block, 1)],
        }
        for name, works in batches.items():
            yield attempt(
                f"attention {dtype} {name}",
                _same,
                rows,
                works,
                whole,
            )


def _same(rows: Callable[[list[Work]], Bits], works: list[Work], whole: Bits) -> str | None:
    for owner, row in rows(works).items():
        wrong = same_bits(row, whole[owner])
        if wrong is not None:
            return f"request {owner[0]}, position {owner[1]}: {wrong}"
    return None


CHECKS: tuple[Check, ...] = (numbers, options, slots, written, padding, poison, invariance)
