"""Masks on logits: packed bits of any length, beside every other rule of a request."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.backend.reference import REFERENCE_OPS
from tokenry.errors import RequestError
from tokenry.params import SamplingParams
from tokenry.runner.mask import apply_masks, on_device
from tokenry.runner.sampler import Draw, Sampler
from tokenry.runner.sampling.rules import is_plain


def packed(allowed, words):
    bits = np.zeros(words * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def draw(params, mask=None):
    history = np.array((3, 4, 5), np.int32)
    plain = is_plain(params)
    return Draw(
        params=params, seed=0, position=3, num_prompt=2, history=history, plain=plain, mask=mask
    )


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 130))
def test_only_the_allowed_tokens_stay(data, vocab):
    words = data.draw(st.integers(1, 6))  # fewer or more than the vocabulary needs
    rows = [
        data.draw(st.none() | st.sets(st.integers(0, words * 32 - 1)), label="row")
        for _ in range(3)
    ]
    logits = torch.zeros(3, vocab)
    masks = [None if row is None else (lambda row=row: packed(row, words)) for row in rows]
    assert apply_masks(logits, masks, "cpu") == {}
    for row, out in zip(rows, logits, strict=True):
        kept = set(torch.isfinite(out).nonzero().flatten().tolist())
        assert kept == set(range(vocab)) & (set(range(vocab)) if row is None else row)
    all_words = -(-vocab // 32)
    whole = [set(range(vocab)) if row is None else row for row in rows]
    table = np.stack([packed({t for t in row if t < vocab}, all_words) for row in whole])
    other = torch.zeros(3, vocab)
    on_device(other, table, "cpu")
    assert torch.equal(other, logits)


def test_a_row_is_drawn_from_its_mask_and_the_other_rows_are_as_without():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(REFERENCE_OPS["sample"], device="cpu", eos_token_ids=(1,), processors={})
    greedy = SamplingParams(temperature=0)
    free = sampler(logits, [draw(greedy), draw(greedy)])
    worst = int(logits[0].argmin())
    bound = sampler(logits, [draw(greedy, lambda: packed({worst}, 2)), draw(greedy)])
    assert bound.token_ids.tolist() == [worst, int(free.token_ids[1])]
    assert bound.broken.tolist() == [0, 0]


@pytest.mark.parametrize(
    "rules", [{"allowed_token_ids": (7,)}, {"bad_words_ids": ((9,),)}], ids=["allowed", "bad word"]
)
def test_a_mask_that_leaves_nothing_beside_the_other_rules_is_told(rules):
    sampler = Sampler(REFERENCE_OPS["sample"], device="cpu", eos_token_ids=(1,), processors={})
    params = SamplingParams(temperature=0, **rules)
    drawn = sampler(torch.zeros(1, 50), [draw(params, lambda: packed({9}, 2))])
    assert drawn.broken.tolist() != [0]


def test_a_grammar_that_cannot_go_on_is_its_own_rows_error():
    def stuck():
        raise RequestError("too complex", param="guided_regex")

    sampler = Sampler(REFERENCE_OPS["sample"], device="cpu", eos_token_ids=(1,), processors={})
    greedy = SamplingParams(temperature=0)
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    drawn = sampler(logits, [draw(greedy, stuck), draw(greedy)])
    assert {i: error.param for i, error in drawn.errors.items()} == {0: "guided_regex"}
    assert int(drawn.token_ids[1]) == int(logits[1].argmax())
