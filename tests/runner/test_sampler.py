import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.backend.reference import REFERENCE_OPS
from tokenry.errors import RequestError
from tokenry.params import SamplingParams
from tokenry.runner.sampler import Sampler
from tokenry.runner.sampling.draw import Draw, uniforms
from tokenry.runner.sampling.processors import installed_processors
from tokenry.runner.sampling.rules import is_plain
from tokenry.runner.sampling.scores import score

VOCAB = 23
EOS = 1


def make_sampler(**processors):
    return Sampler(
        REFERENCE_OPS["sample"], device="cpu", eos_token_ids=(EOS,), processors=processors
    )


def draw(params, history=(3, 4, 5), num_prompt=2, seed=0):
    return Draw(
        params=params,
        seed=seed,
        position=len(history),
        num_prompt=num_prompt,
        history=np.array(history, np.int32),
        plain=is_plain(params),
    )


def greedy(**values):
    return SamplingParams(temperature=0, **values)


def one(logits, params, **values):
    """The token that one row draws."""
    return int(make_sampler()(logits[None], [draw(params, **values)]).token_ids[0])


def adjusted(logits, one):
    """What the op is given to draw from, of one row."""
    seen = []

    def op(x, inputs):
        seen.append(x)
        return x.argmax(-1).to(torch.int32)

    Sampler(op, device="cpu", eos_token_ids=(EOS,), processors={})(logits[None], [one])
    return seen[0][0]


def test_rows_without_rules_reach_the_op_untouched(logits):
    plain = draw(SamplingParams(temperature=0.7, top_k=4, top_p=0.9, min_p=0.1))
    assert adjusted(logits, plain).data_ptr() == logits.data_ptr()
    assert adjusted(logits, draw(greedy())).data_ptr() == logits.data_ptr()
    before = logits.clone()
    assert adjusted(logits, draw(greedy(logit_bias={3: 1.0})))[3] == before[3] + 1
    assert torch.equal(logits, before)


@pytest.fixture
def logits():
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))


def test_bias_allowed_and_forbidden_tokens(logits):
    best = int(logits.argmax())
    worst = int(logits.argmin())
    assert one(logits, greedy()) == best
    assert one(logits, greedy(logit_bias={worst: 100.0})) == worst
    assert one(logits, greedy(allowed_token_ids=(worst,))) == worst
    assert one(logits, greedy(bad_words_ids=((best,),))) != best
    assert one(logits, greedy(bad_words_ids=((5, best),)), history=(3, 4, 5)) != best
    assert one(logits, greedy(bad_words_ids=((6, best),)), history=(3, 4, 5)) == best


def test_no_end_before_min_tokens(logits):
    logits[EOS] = 50.0
    logits[7] = 49.0
    params = greedy(min_tokens=2, stop_token_ids=(7,))
    assert one(logits, params, history=(3, 4, 5)) not in (EOS, 7)
    assert one(logits, params, history=(3, 4, 5, 6)) == EOS
    assert one(logits, greedy(min_tokens=2, ignore_eos=True), history=(3, 4, 5)) == EOS


@settings(max_examples=50, deadline=None)
@given(
    history=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=12),
    repetition=st.sampled_from([0.7, 1.0, 1.3]),
    frequency=st.sampled_from([-1.0, 0.0, 0.6]),
    presence=st.sampled_from([-0.5, 0.0, 0.8]),
)
def test_penalties_are_those_of_the_definition(history, repetition, frequency, presence):
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(len(history)))
    params = SamplingParams(
        temperature=0,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    want = row.clone()
    for token in set(history):
        want[token] = want[token] / repetition if want[token] > 0 else want[token] * repetition
    for token in set(history[2:]):
        want[token] -= frequency * history[2:].count(token) + presence
    got = adjusted(row, draw(params, history=tuple(history)))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=1.0, top_k=4),
        SamplingParams(temperature=1.0, top_p=0.6),
        SamplingParams(temperature=1.3, min_p=0.2),
        SamplingParams(temperature=0.9, top_k=8, top_p=0.8, min_p=0.05),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "all"],
)
def test_draws_follow_the_filtered_distribution(logits, params):
    p = torch.softmax(logits / params.temperature, 0)
    order = p.argsort(descending=True)
    keep = torch.ones(VOCAB, dtype=torch.bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
    ranked = torch.where(keep[order], p[order], 0.0)
    before = ranked.cumsum(0) - ranked
    keep[order[before >= params.top_p * ranked.sum()]] = False
    keep &= p >= params.min_p * p.max()
    want = torch.where(keep, p, 0.0) / p[keep].sum()
    n = 4000
    draws = [draw(params, history=tuple([3] * (2 + i % 50)), seed=i // 50) for i in range(n)]
    tokens = make_sampler()(logits.expand(n, -1), draws).token_ids
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    assert counts[~keep].sum() == 0
    expected = want[keep].double() * n
    chi_square = float(((counts[keep] - expected) ** 2 / expected).sum())
    assert chi_square < 3 * int(keep.sum()) + 12  # far beyond the 99.9 % point of so many cells


def test_a_row_does_not_depend_on_the_batch(logits):
    rows = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(2))
    params = [
        greedy(),
        SamplingParams(temperature=0.9, top_k=5),
        SamplingParams(presence_penalty=0.4, top_p=0.9),
        SamplingParams(temperature=1.1, logit_bias={4: 3.0}),
    ]
    draws = [draw(params[i % 4], seed=i) for i in range(16)]
    together = make_sampler()(rows, draws).token_ids.tolist()
    alone = [int(make_sampler()(rows[i : i + 1], [d]).token_ids[0]) for i, d in enumerate(draws)]
    assert together == alone


def test_uniforms_are_even_and_depend_on_seed_and_position():
    u = uniforms(list(range(1000)) * 10, [i for i in range(10) for _ in range(1000)])
    assert u.dtype == np.float32
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    histogram = np.histogram(u, 20, (0, 1))[0]
    assert abs(histogram - 500).max() < 110
    assert len(np.unique(u)) > 9900
    assert uniforms([-5], [3]) == uniforms([-5], [3])


def test_scores_are_log_probabilities_with_ranks(logits):
    rows = torch.stack([logits, -logits])
    tokens = torch.tensor([3, 4])
    scores = score(rows, tokens, 5)
    want = torch.log_softmax(rows, -1)
    torch.testing.assert_close(scores.chosen, want[[0, 1], [3, 4]])
    for i in range(2):
        assert int(scores.rank[i]) == 1 + int((want[i] > want[i, tokens[i]]).sum())
        assert scores.top_tokens[i].tolist() == want[i].topk(5).indices.tolist()


def test_an_unknown_processor_is_an_error_that_names_the_known(logits):
    sampler = make_sampler(known=lambda args: None)
    with pytest.raises(Exception, match="no logits processor 'x'; installed: known"):
        sampler(logits[None], [draw(greedy(logits_processor="x"))])


def test_installed_processors_load_when_used_and_a_broken_one_is_its_requests_error(
    logits, tmp_path, monkeypatch
):
    home = tmp_path / "odd_processors-1.0.dist-info"
    home.mkdir()
    (home / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-processors\nVersion: 1.0\n")
    (home / "entry_points.txt").write_text(
        "[tokenry.logits_processors]\n"
        "whole = odd_whole_processor:make\n"
        "broken = odd_broken_processor:make\n"
        "absent = odd_whole_processor:nothing\n"
    )
    whole = "def make(args):\n    return lambda history, logits: -logits\n"
    (tmp_path / "odd_whole_processor.py").write_text(whole)
    (tmp_path / "odd_broken_processor.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    processors = installed_processors()
    assert {"whole", "broken", "absent"} <= set(processors)
    assert not {"odd_whole_processor", "odd_broken_processor"} & set(sys.modules)
    sampler = make_sampler(**processors)
    token = sampler(logits[None], [draw(greedy(logits_processor="whole"))]).token_ids[0]
    assert int(token) == int(logits.argmin())
    for name, cause in (("broken", "a_package_that_is_not_there"), ("absent", "nothing")):
        with pytest.raises(RequestError, match=cause) as caught:
            sampler.make_processor(greedy(logits_processor=name))
        assert caught.value.param == "logits_processor"
