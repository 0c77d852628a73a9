"""Checks of the sample op."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenry.backend.base import Backend, Op, SampleInputs
from tokenry.backend.contract import Caps
from tokenry.backend.ops import OpTable
from tokenry.backend.reference import REFERENCE_OPS
from tokenry.conformance.check import Case, Check, attempt, check
from tokenry.conformance.kit import Kit

VOCAB = 300
EDGE = 1e-4
"""A draw this close to the border between two tokens may fall on either side: sums are rounded."""


def core_samples(caps: Caps) -> str | None:
    """Asked only where the core draws."""
    return None if caps.sampling == "logits" else "the programs of this device give token ids"


def inputs(
    rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
    seed: int = 0,
) -> SampleInputs:  # fmt: skip
    """The same settings for each row, a draw of its own."""
    generator = torch.Generator().manual_seed(seed)
    return SampleInputs(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k, dtype=torch.int32),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        uniform=torch.rand((rows,), generator=generator),
        any_filter=top_k > 0 or top_p < 1 or min_p > 0,
    )


def moved(given: SampleInputs, device: str) -> SampleInputs:
    """The inputs on the device."""
    names = ("temperature", "top_k", "top_p", "min_p", "uniform")
    return replace(given, **{name: getattr(given, name).to(device) for name in names})


def _op(backend: Backend, logits: torch.Tensor) -> Op:
    return OpTable(backend.ops()).resolve("sample", vocab_size=logits.shape[1])


def draw(backend: Backend, logits: torch.Tensor, given: SampleInputs) -> NDArray[np.int64]:
    """The backend's op, with its result checked for shape and dtype."""
    op = _op(backend, logits)
    device = backend.caps.input_device
    with torch.inference_mode():
        out = op(logits.to(device), moved(given, device))
    if tuple(out.shape) != (len(logits),) or out.dtype != torch.int32:
        raise ValueError(f"gave {list(out.shape)} {out.dtype}, not [{len(logits)}] int32")
    found: NDArray[np.int64] = backend.fetch([out])()[0].astype(np.int64)
    return found


def logits_of(rows: int, *, scale: float = 3.0, seed: int = 1) -> torch.Tensor:
    """[rows, VOCAB] float32."""
    return torch.randn((rows, VOCAB), generator=torch.Generator().manual_seed(seed)) * scale


@check(
    "C03.sample_greedy",
    "Greedy is the largest logit, of equal ones the lowest id.",
    asked=core_samples,
)
def greedy(kit: Kit) -> Iterator[Case]:
    """Temperature 0 with and without the batch's all_greedy flag; ties at the ends and in the
    middle; rows of -inf but for one token.
    """
    backend = kit.open()
    logits = logits_of(6)
    logits[1, [5, 100, 299]] = 50.0
    logits[2, [0, 299]] = 50.0
    logits[3] = 1.0
    logits[4] = -torch.inf
    logits[4, 17] = -3.0
    want = logits.numpy().argmax(1)
    for flag in (True, False):
        given = replace(inputs(6, temperature=0.0), all_greedy=flag)
        yield attempt(
            f"sample [6, {VOCAB}] all_greedy={flag}",
            _chosen,
            backend,
            logits,
            given,
            want,
        )
    yield attempt("sample: checked, if the op has it", _told, backend, logits, want)
    mixed = replace(inputs(6), temperature=torch.tensor([0.0, 0.0, 0.7, 0.0, 0.0, 1.0]))
    rows = [0, 1, 3, 4]
    yield attempt(
        "sample: greedy rows among others",
        lambda: _equal(draw(backend, logits, mixed)[rows], want[rows]),
    )


def _told(backend: Backend, logits: torch.Tensor, want: NDArray[np.int64]) -> str | None:
    """The ids of `checked`, and which rows it tells to be broken: NaN among others, infinity, none
    but -inf.
    """
    checked = getattr(_op(backend, logits), "checked", None)
    if checked is None:
        return None
    some = torch.cat([logits, logits_of(4, seed=3)])
    some[6, 250], some[7, 0], some[8] = torch.nan, torch.inf, -torch.inf
    device = backend.caps.input_device
    given = replace(inputs(len(some), temperature=0.0), all_greedy=True)
    with torch.inference_mode():
        ids, broken = backend.fetch([*checked(some.to(device), moved(given, device))])()
    if broken.tolist() != [0] * 6 + [1] * 3 + [0]:
        return f"told {broken.tolist()}, but rows 6 (NaN), 7 (inf) and 8 (all -inf) are broken"
    return _equal(ids[:6].astype(np.int64), want)


def _chosen(
    backend: Backend, logits: torch.Tensor, given: SampleInputs, want: NDArray[np.int64]
) -> str | None:
    return _equal(draw(backend, logits, given), want)


def _equal(got: NDArray[np.int64], want: NDArray[np.int64]) -> str | None:
    bad = np.flatnonzero(got != want)
    if not len(bad):
        return None
    row = int(bad[0])
    return f"row {row} drew {got[row]}, expected {want[row]} ({len(bad)} of {len(got)} rows differ)"


@check(
    "C03.sample",
    "A draw follows the row's temperature, top_k, top_p and min_p, and is fixed by its uniform.",
    asked=core_samples,
)
def draws(kit: Kit) -> Iterator[Case]:
    """64 rows per setting against the reference op; a row whose uniform lies within 1e-4 of the
    border between two tokens may differ. The same inputs twice give the same tokens, other uniforms
    give others.
    """
    backend = kit.open()
    logits = logits_of(64)
    most = kit.caps.sample_max_top_k or VOCAB
    settings: tuple[dict[str, Any], ...] = (
        {}, {"temperature": 0.3}, {"temperature": 2.5}, {"top_k": 1}, {"top_k": min(5, most)},
        {"top_k": min(250, most)}, {"top_p": 0.9}, {"top_p": 0.1}, {"min_p": 0.1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.02}, {"temperature": 1e-6},
    )  # fmt: skip
    for values in settings:
        given = inputs(64, **values)
        yield attempt(
            f"sample [64, {VOCAB}] {values or 'plain'}",
            _drawn,
            backend,
            logits,
            given,
        )
    yield attempt("sample: other uniforms draw other tokens", lambda: _moves(backend, logits))


def _drawn(backend: Backend, logits: torch.Tensor, given: SampleInputs) -> str | None:
    got = draw(backend, logits, given)
    if not np.array_equal(got, draw(backend, logits, given)):
        return "the same inputs gave other tokens the second time"
    if (got < 0).any() or (got >= VOCAB).any():
        return f"drew token {got.max()} of a vocabulary of {VOCAB}"
    op = REFERENCE_OPS["sample"]
    allowed = []
    for shift in (-EDGE, 0.0, EDGE):
        uniform = (given.uniform + shift).clamp(0.0, 1.0 - 1e-7)
        allowed.append(op(logits, replace(given, uniform=uniform)).numpy())
    bad = np.flatnonzero(~np.isin(got, allowed) | ~(got == np.stack(allowed)).any(0))
    if not len(bad):
        return None
    row = int(bad[0])
    return (
        f"row {row} drew {got[row]}, expected {allowed[1][row]} at uniform "
        f"{float(given.uniform[row]):.6f} ({len(bad)} of 64 rows differ)"
    )


def _moves(backend: Backend, logits: torch.Tensor) -> str | None:
    flat = logits * 0.1
    first, second = (draw(backend, flat, inputs(64, seed=seed)) for seed in (3, 4))
    same = int((first == second).sum())
    return f"{same} of 64 rows drew the same token from other uniforms" if same > 16 else None


@check("C07.sample", "No row's draw depends on another row.", asked=core_samples)
def rows(kit: Kit) -> Iterator[Case]:
    """32 rows of mixed settings together, then each by itself: the same tokens."""
    backend = kit.open()
    logits, n = logits_of(32, seed=5), 32
    rng = np.random.default_rng(0)
    given = SampleInputs(
        temperature=torch.from_numpy(rng.choice([0.0, 0.7, 1.3], n).astype(np.float32)),
        top_k=torch.from_numpy(rng.choice([0, 5, 50], n).astype(np.int32)),
        top_p=torch.from_numpy(rng.choice([1.0, 0.9], n).astype(np.float32)),
        min_p=torch.from_numpy(rng.choice([0.0, 0.05], n).astype(np.float32)),
        uniform=torch.from_numpy(rng.random(n, np.float32)),
    )
    names = ("temperature", "top_k", "top_p", "min_p", "uniform")

    def alone(row: int) -> int:
        part = {name: getattr(given, name)[row : row + 1] for name in names}
        return int(draw(backend, logits[row : row + 1], replace(given, **part))[0])

    yield attempt(
        f"sample [32, {VOCAB}] and [1, {VOCAB}]",
        lambda: _equal(draw(backend, logits, given), np.array([alone(i) for i in range(n)])),
    )


CHECKS: tuple[Check, ...] = (greedy, draws, rows)
