"""The native draw: what the reference op draws, for every filter, without a sorted vocabulary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.backend.base import SampleInputs
from tokenry.backend.reference import REFERENCE_OPS
from tokenry_cpu import native, native_ops

SAMPLE = native_ops.Sample()


def inputs(rows, **values):
    def column(name, default, dtype=torch.float32):
        return torch.as_tensor(values.get(name, [default] * rows), dtype=dtype)

    return SampleInputs(
        temperature=column("temperature", 1.0),
        top_k=column("top_k", 0, torch.int32),
        top_p=column("top_p", 1.0),
        min_p=column("min_p", 0.0),
        uniform=column("uniform", 0.5),
    )


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_it_draws_what_the_reference_draws(data):
    rows = data.draw(st.integers(1, 5))
    size = data.draw(st.sampled_from([1, 2, 17, 300, 5000]))
    seed = data.draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((rows, size), generator=generator) * data.draw(st.sampled_from([1, 6]))
    if data.draw(st.booleans()):
        logits = logits.round()  # many equals
    if data.draw(st.booleans()) and size > 2:
        logits[:, 1 : size // 2] = -torch.inf

    def each(values):
        return data.draw(st.lists(st.sampled_from(values), min_size=rows, max_size=rows))

    wanted = inputs(
        rows,
        temperature=each([0.0, 0.3, 1.0, 3.0]),
        top_k=each([0, 1, 3, 40, 10**6]),
        top_p=each([0.05, 0.5, 0.93, 1.0]),
        min_p=each([0.0, 0.02, 0.3, 1.0]),
        uniform=torch.rand(rows, generator=generator) * 0.999,
    )
    got, want = SAMPLE(logits, wanted), REFERENCE_OPS["sample"](logits, wanted)
    for row in torch.nonzero(got != want)[:, 0].tolist():  # only where float sums decide
        assert near_a_border(logits[row].double(), wanted, row, int(got[row]), int(want[row]))


def near_a_border(logits, wanted, row, got, want):
    """Whether a difference of 1e-5 in the uniform number or in top_p gives the other id."""
    for u in (-1e-5, 0.0, 1e-5):
        for p in (-1e-5, 0.0, 1e-5):
            top_p = float(wanted.top_p[row])
            one = SampleInputs(
                temperature=wanted.temperature[row : row + 1].double(),
                top_k=wanted.top_k[row : row + 1],
                top_p=torch.tensor([top_p + (p if top_p < 1 else 0)], dtype=torch.float64),
                min_p=wanted.min_p[row : row + 1].double(),
                uniform=(wanted.uniform[row : row + 1].double() + u).clamp(0, 1 - 1e-9),
            )
            if int(REFERENCE_OPS["sample"](logits[None], one)) == got:
                return True
    return False


@pytest.mark.parametrize("isa", native.isas())
def test_frequencies_follow_the_filtered_distribution(isa):
    assert native.set_isa(isa)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0, -5.0]])
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n
    got = SAMPLE(logits.expand(n, -1), inputs(n, top_k=[4] * n, top_p=[0.95] * n, uniform=uniform))
    counts = torch.bincount(got.long(), minlength=6) / n
    p = torch.softmax(logits[0, [0, 1, 4]], 0)  # of the 4 largest the first three reach 95 %
    torch.testing.assert_close(counts[[0, 1, 4]], p, atol=1e-3, rtol=0)
    assert counts[[2, 3, 5]].sum() == 0
    native.set_isa(native.isas()[0])


def test_a_row_keeps_its_draw_in_any_company():
    torch.manual_seed(0)
    logits, uniform = torch.randn(9, 4000), torch.rand(9)
    rule = {"top_p": [0.9] * 9, "uniform": uniform}
    together = SAMPLE(logits, inputs(9, **rule))
    for i in range(9):
        alone = SAMPLE(logits[i : i + 1], inputs(1, top_p=[0.9], uniform=uniform[i : i + 1]))
        assert alone[0] == together[i]


def test_of_equal_logits_greedy_takes_the_lowest_id():
    logits = torch.zeros(1, 100)
    logits[0, [40, 70]] = 5.0
    assert SAMPLE(logits, inputs(1, temperature=[0.0])).tolist() == [40]


@pytest.mark.parametrize("isa", native.isas())
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_it_tells_which_rows_are_broken(isa, data):
    rows, size = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 15, 16, 33, 700]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = torch.randn((rows, size), generator=generator).round()
    for row in range(rows):
        for value in data.draw(st.lists(st.sampled_from([torch.nan, torch.inf, -torch.inf]))):
            logits[row, data.draw(st.integers(0, size - 1))] = value
    if data.draw(st.booleans()):
        logits[0] = -torch.inf
    best = native.isa()
    native.set_isa(isa)
    try:
        ids, broken = SAMPLE.checked(logits, inputs(rows, temperature=[0.0] * rows))
    finally:
        native.set_isa(best)
    assert broken.tolist() == (~logits.amax(-1).isfinite()).int().tolist()
    whole = ~broken.bool()
    assert torch.equal(ids[whole].long(), logits.argmax(-1)[whole])
