"""The sample kernel against the reference op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.backend.base import SampleInputs
from tokenry.backend.reference import REFERENCE_OPS
from tokenry_triton import sample as room
from tokenry_triton.ops import triton_ops

OP = triton_ops("sm_90")["sample"]
VOCAB = 300


def inputs(rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0):
    return SampleInputs(
        temperature=torch.full((rows,), temperature),
        top_k=torch.full((rows,), top_k, dtype=torch.int32),
        top_p=torch.full((rows,), top_p),
        min_p=torch.full((rows,), min_p),
        uniform=torch.rand((rows,), generator=torch.Generator().manual_seed(seed)),
        any_filter=top_k > 0 or top_p < 1 or min_p > 0,
    )


def logits_of(rows, seed=1):
    return torch.randn((rows, VOCAB), generator=torch.Generator().manual_seed(seed)) * 3


def assert_drawn(logits, given_inputs, edge=1e-5):
    """Equal to the reference but for rows whose uniform lies on a border of two tokens."""
    got, want = OP(logits, given_inputs), REFERENCE_OPS["sample"](logits, given_inputs)
    assert got.dtype == torch.int32
    for row in (got != want).nonzero()[:, 0].tolist():
        near = {
            int(REFERENCE_OPS["sample"](logits, replace(given_inputs, uniform=moved))[row])
            for by in (-edge, edge)
            if (moved := (given_inputs.uniform + by).clamp(0, 1 - 1e-7)) is not None
        }
        assert int(got[row]) in near, (row, got[row], want[row])


@pytest.mark.parametrize("block", [1024, 64], ids=["one block", "blocks"])
@pytest.mark.parametrize(
    "values",
    [
        {}, {"temperature": 0.3}, {"top_k": 1}, {"top_k": 5}, {"top_k": 250}, {"top_p": 0.9},
        {"top_p": 0.1}, {"min_p": 0.1}, {"temperature": 1e-6},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)  # fmt: skip
def test_draws_are_the_references(values, block, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", block)
    rows = 12 if block == 1024 else 3
    assert_drawn(logits_of(rows), inputs(rows, **values))


@pytest.mark.parametrize("flag", [True, False])
def test_greedy_takes_the_lowest_of_equals(flag, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", 64)
    logits = logits_of(4)
    logits[1, [5, 100, 299]] = 50.0
    logits[2] = 1.0
    logits[3] = -torch.inf
    logits[3, 170] = -3.0
    got = OP(logits, replace(inputs(4, temperature=0.0), all_greedy=flag))
    assert got.tolist() == logits.argmax(1).tolist()


def test_greedy_rows_among_others():
    logits = logits_of(4)
    mixed = replace(inputs(4), temperature=torch.tensor([0.0, 1.0, 0.0, 0.5]))
    got = OP(logits, mixed)
    assert got[[0, 2]].tolist() == logits.argmax(1)[[0, 2]].tolist()


@pytest.mark.parametrize("values", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.7}])
def test_of_equal_logits_the_lower_ids_are_kept(values, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", 4)
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 0.0, 2.0, 2.0, 1.0]).repeat(8, 1)
    uniform = torch.arange(8) / 8 + 0.06
    assert_drawn(logits, replace(inputs(8, **values), uniform=uniform))


def test_what_is_minus_infinity_or_not_a_number_is_never_drawn():
    logits = logits_of(6)
    logits[:, ::2] = -torch.inf
    logits[:, 1] = torch.nan
    uniform = torch.tensor([0.0, 0.2, 0.5, 0.9, 0.99999, 0.9999999])
    for values in ({}, {"top_p": 0.9999}, {"top_k": 299}):
        got = OP(logits, replace(inputs(6, **values), uniform=uniform))
        assert (got % 2 == 1).all()
        assert (got != 1).all()


def test_a_row_draws_the_same_alone():
    logits, given_inputs = logits_of(5), inputs(5, top_p=0.8, top_k=40)
    together = OP(logits, given_inputs)
    names = ("temperature", "top_k", "top_p", "min_p", "uniform")
    alone = replace(given_inputs, **{n: getattr(given_inputs, n)[3:4] for n in names})
    assert OP(logits[3:4], alone).tolist() == together[3:4].tolist()


@settings(max_examples=8, deadline=None)
@given(
    top_k=st.integers(0, 320), top_p=st.floats(0.01, 1.0), min_p=st.sampled_from([0.0, 0.05]),
    levels=st.integers(1, 60), seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_settings_on_rows_with_many_equals(top_k, top_p, min_p, levels, seed):
    logits = (logits_of(3, seed) * levels / 8).round() / levels * 8
    assert_drawn(logits, inputs(3, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed), edge=1e-4)
