"""Sampling extras against slow plain-python oracles, and that no row depends on its batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenry.backend.reference import REFERENCE_OPS
from tokenry.params import SamplingParams, Watermark
from tokenry.runner.sampler import Sampler
from tokenry.runner.sampling.choice import narrow, next_mu
from tokenry.runner.sampling.draw import Draw
from tokenry.runner.sampling.marks import context_hash, green, numbers, seen_before
from tokenry.runner.sampling.repeats import dry_penalties, repeated_ngrams
from tokenry.runner.sampling.rules import is_plain

VOCAB = 29
FEW = settings(max_examples=60, deadline=None)


def sampler():
    return Sampler(REFERENCE_OPS["sample"], device="cpu", eos_token_ids=(1,), processors={})


def adjusted(logits, one):
    """What the op is given to draw from, of one row."""
    seen = []

    def op(x, inputs):
        seen.append(x)
        return x.argmax(-1).to(torch.int32)

    Sampler(op, device="cpu", eos_token_ids=(1,), processors={})(logits[None], [one])
    return seen[0][0]


def draw(params, history=(3, 4, 5), num_prompt=2, seed=0, mu=None):
    return Draw(
        params=params, seed=seed, position=len(history), num_prompt=num_prompt,
        history=np.array(history, np.int32), mu=mu, plain=is_plain(params),
    )  # fmt: skip


def row(seed, spread=3.0):
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


# ---- the oracle: lists and loops -------------------------------------------------------------


def normalised(p):
    total = sum(p.values())
    return {t: x / total for t, x in p.items()}


def left_by(logits, params, coin_falls=False, mu=math.inf):
    """Tokens that the definitions leave, one filter after the other."""
    values = [float(x) for x in logits]
    top = max(values)
    kept = set(range(len(values)))
    if params.top_n_sigma > 0:
        mean = sum(values) / len(values)
        sigma = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
        kept = {t for t in kept if values[t] >= top - params.top_n_sigma * sigma}
    ranked = sorted(kept, key=lambda t: (-values[t], t))
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    p = normalised({t: math.exp((values[t] - top) / params.temperature) for t in ranked})
    if params.typical_p < 1:
        entropy = -sum(x * math.log(x) for x in p.values() if x > 0)
        surprise = {t: -math.log(x) if x > 0 else math.inf for t, x in p.items()}
        order = sorted(p, key=lambda t: abs(surprise[t] - entropy))
        held, chosen = 0.0, []
        for t in order:
            chosen.append(t)
            held += p[t]
            if held >= params.typical_p:
                break
        p = normalised({t: p[t] for t in ranked if t in chosen})
    if params.top_p < 1:
        held, chosen = 0.0, []
        for t, x in p.items():
            if held >= params.top_p:
                break
            chosen.append(t)
            held += x
        p = {t: p[t] for t in chosen}
    most = max(p.values())
    p = normalised({t: x for t, x in p.items() if x >= params.min_p * most})
    if coin_falls:
        above = [t for t, x in p.items() if x >= params.xtc_threshold]
        p = normalised({t: x for t, x in p.items() if t not in above[:-1]})
    surviving = {t for t, x in p.items() if -math.log2(x) <= mu}
    return surviving or {next(iter(p))}


@FEW
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    typical=st.sampled_from([1.0, 0.9, 0.51, 0.2]),
    sigma=st.sampled_from([-1.0, 0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 3, 11]),
    top_p=st.sampled_from([1.0, 0.77]),
    min_p=st.sampled_from([0.0, 0.031]),
    xtc=st.sampled_from([(0.0, 0.1), (1.0, 0.073), (1.0, 0.6)]),
    tau=st.sampled_from([0.0, 1.3, 3.1]),
)
def test_what_is_left_is_what_the_definitions_leave(
    seed, temperature, typical, sigma, top_k, top_p, min_p, xtc, tau
):
    params = SamplingParams(
        temperature=temperature, typical_p=typical, top_n_sigma=sigma, top_k=top_k, top_p=top_p,
        min_p=min_p, xtc_probability=xtc[0], xtc_threshold=xtc[1],
        mirostat=2 if tau else 0, mirostat_tau=tau,
    )  # fmt: skip
    logits = row(seed)
    got = narrow(logits[None], [draw(params)])[0]
    mu = 2 * tau if tau else math.inf
    want = left_by(logits, params, coin_falls=xtc[0] == 1.0, mu=mu)
    assert set(torch.isfinite(got).nonzero()[:, 0].tolist()) == want
    assert torch.equal(got[list(want)], logits[list(want)])


def dry_by_definition(history, p):
    """All earlier places, longest common endings, by comparing token by token."""
    if p.dry_range:
        history = history[-p.dry_range :]
    if len(history) < 2 or history[-1] in p.dry_breaker_ids:
        return {}
    longest = {}
    for i in range(len(history) - 1):
        follower = history[i + 1]
        if history[i] != history[-1] or follower in p.dry_breaker_ids:
            continue
        n = 0
        while n <= i and history[i - n] == history[-1 - n]:
            if history[i - n] in p.dry_breaker_ids:
                break
            n += 1
        longest[follower] = max(longest.get(follower, 0), n)
    return {
        t: p.dry_multiplier * p.dry_base ** (n - p.dry_allowed_length)
        for t, n in longest.items()
        if n >= p.dry_allowed_length
    }


HISTORIES = st.lists(st.integers(0, 4), min_size=1, max_size=24)


@FEW
@given(
    history=HISTORIES,
    allowed=st.integers(1, 4),
    breakers=st.sampled_from([(), (3,), (0, 4)]),
    reach=st.sampled_from([0, 5, 9]),
)
def test_dry_is_its_definition(history, allowed, breakers, reach):
    params = SamplingParams(
        temperature=0, dry_multiplier=0.8, dry_allowed_length=allowed, dry_range=reach,
        dry_breaker_ids=breakers,
    )  # fmt: skip
    one = draw(params, history=history, num_prompt=1)
    want = dry_by_definition(history, params)
    assert dry_penalties(one) == pytest.approx(want)
    logits = row(len(history))
    expected = logits.clone()
    for token, penalty in want.items():
        expected[token] -= penalty
    got = adjusted(logits, one)
    torch.testing.assert_close(got, expected)


def test_dry_stays_finite_however_long_the_repeat():
    params = SamplingParams(dry_multiplier=5.0, dry_base=4.0)
    penalties = dry_penalties(draw(params, history=[7] * 4000))
    assert 1e30 < penalties[7] < 3.4e38
    logits = row(0)
    logits[7] = 30.0
    token = sampler()(logits[None], [draw(params, history=[7] * 4000)])
    assert int(token.token_ids[0]) != 7
    assert int(token.broken[0]) == 0


@FEW
@given(history=HISTORIES, size=st.integers(1, 5))
def test_no_ngram_comes_twice(history, size):
    begun = history[len(history) - size + 1 :] if size > 1 else []
    want = {
        history[i + size - 1]
        for i in range(len(history) - size + 1)
        if history[i : i + size - 1] == begun
    }
    if len(history) < size:
        want = set()
    assert set(repeated_ngrams(np.array(history, np.int32), size).tolist()) == want
    params = SamplingParams(temperature=0, no_repeat_ngram_size=size)
    out = adjusted(row(1), draw(params, history=history, num_prompt=1))
    assert set(torch.isinf(out).nonzero()[:, 0].tolist()) == want


@FEW
@given(seed=st.integers(0, 10_000), tau=st.sampled_from([1.0, 3.0]), eta=st.sampled_from([0.1, 1]))
def test_mirostat_corrects_its_bound_by_the_surprise(seed, tau, eta):
    params = SamplingParams(mirostat=2, mirostat_tau=tau, mirostat_eta=eta, temperature=1.3)
    logits, one = row(seed), draw(params, seed=seed, mu=tau + 0.4)
    sampled = sampler()(logits[None], [one])
    left = left_by(logits, params, mu=tau + 0.4)
    token = int(sampled.token_ids[0])
    assert token in left
    weights = {t: math.exp(float(logits[t] - logits.max()) / 1.3) for t in left}
    bits = -math.log2(weights[token] / sum(weights.values()))
    assert float(sampled.mu[0]) == pytest.approx(tau + 0.4 - eta * (bits - tau), abs=1e-4)
    assert sampled.mu_rows == (0,)


def test_mirostat_keeps_the_surprise_near_its_target():
    params = SamplingParams(mirostat=2, mirostat_tau=2.5, mirostat_eta=0.3)
    mu, bits = None, []
    for step in range(300):
        logits = torch.randn(400, generator=torch.Generator().manual_seed(step)) * 2
        one = draw(params, history=[3] * (2 + step), mu=mu)
        out = sampler()(logits[None], [one])
        before = 5.0 if mu is None else mu
        mu = float(out.mu[0])
        bits.append((before - mu) / 0.3 + 2.5)
    assert abs(sum(bits[50:]) / 250 - 2.5) < 0.15


def test_xtc_leaves_the_best_out_as_often_as_asked():
    params = SamplingParams(xtc_probability=0.3, xtc_threshold=0.2)
    logits = torch.full((VOCAB,), -20.0)
    logits[5], logits[6] = 1.0, 0.8
    draws = [draw(params, seed=i, history=[3] * (3 + i % 7)) for i in range(2000)]
    left = narrow(logits.expand(2000, -1), draws)
    share = float(torch.isinf(left[:, 5]).float().mean())
    assert abs(share - 0.3) < 0.05
    assert not torch.isinf(left[:, 6]).any()


ALL = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(typical_p=0.6, top_k=9),
    SamplingParams(top_n_sigma=1.2, temperature=1.5),
    SamplingParams(xtc_probability=0.5, min_p=0.02),
    SamplingParams(mirostat=2, mirostat_tau=2.0),
    SamplingParams(dry_multiplier=1.0, top_p=0.9),
    SamplingParams(no_repeat_ngram_size=2, temperature=0),
    SamplingParams(watermark=Watermark(scheme="kgw", key=9)),
    SamplingParams(watermark=Watermark(scheme="gumbel", key=9), top_p=0.95),
    SamplingParams(watermark=Watermark(scheme="gumbel", key=9), mirostat=2),
]


def test_a_row_draws_alone_what_it_draws_in_a_batch_of_all_kinds():
    n = 4 * len(ALL)
    rows = torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(2)) * 2
    history = [3, 4, 3, 4, 3]
    draws = [draw(ALL[i % len(ALL)], seed=i, history=history) for i in range(n)]
    together = sampler()(rows, draws)
    mus = dict(zip(together.mu_rows, together.mu.tolist(), strict=True))
    for i, one in enumerate(draws):
        alone = sampler()(rows[i : i + 1], [one])
        assert int(alone.token_ids[0]) == int(together.token_ids[i]), ALL[i % len(ALL)]
        if i in mus:
            assert float(alone.mu[0]) == mus[i]


def test_rows_without_extras_cost_nothing():
    logits = torch.randn(3, VOCAB)
    plain = [draw(SamplingParams(top_k=5)), draw(SamplingParams(temperature=0)), None]
    seen = []

    def op(given, inputs):
        seen.append((given, inputs.any_filter))
        return REFERENCE_OPS["sample"](given, inputs)

    one = Sampler(op, device="cpu", eos_token_ids=(), processors={})
    one(logits, plain)
    assert seen[0][0] is logits
    one(logits, [draw(SamplingParams(typical_p=0.5)), plain[1], None])
    assert seen[1][1] is False  # the narrowed row asks nothing of the op's own filters
    assert torch.equal(seen[1][0][1:], logits[1:])


def test_the_gumbel_mark_takes_the_largest_r_to_the_one_by_p():
    params = SamplingParams(
        temperature=0.8, top_k=7, watermark=Watermark(scheme="gumbel", key=3, context=2)
    )
    for seed in range(40):
        logits, history = row(seed), [2, 3, seed, seed + 1]
        r = numbers(context_hash(3, history[-2:]), np.arange(VOCAB))
        p = torch.softmax(logits / 0.8, 0)
        best = p.argsort(descending=True)[:7].tolist()
        mass = float(p[best].sum())
        want = max(best, key=lambda t: math.log(r[t]) / (float(p[t]) / mass))
        token = sampler()(logits[None], [draw(params, history=history, seed=seed)]).token_ids[0]
        assert int(token) == want


@FEW
@given(history=st.lists(st.integers(0, 2), min_size=1, max_size=12), width=st.integers(1, 3))
def test_a_context_marks_one_token_only(history, width):
    num_prompt = 1
    contexts = [tuple(history[i - width : i]) for i in range(max(num_prompt, width), len(history))]
    want = len(history) >= width and tuple(history[-width:]) in contexts
    assert seen_before(np.array(history, np.int32), num_prompt, width) == want


def test_green_tokens_are_gamma_of_all_and_get_delta():
    state = context_hash(11, (5,))
    tokens = np.arange(50_000)
    assert abs(green(state, tokens, 0.25).mean() - 0.25) < 0.01
    assert abs(numbers(state, tokens).mean() - 0.5) < 0.01
    params = SamplingParams(temperature=0, watermark=Watermark(scheme="kgw", key=11, delta=1.5))
    logits = row(4)
    got = adjusted(logits, draw(params))
    want = logits + 1.5 * torch.from_numpy(green(state, np.arange(VOCAB), 0.25))
    torch.testing.assert_close(got, want.to(torch.float32))


def test_next_bound_depends_on_the_row_alone():
    params = SamplingParams(mirostat=2)
    rows = torch.randn(5, VOCAB)
    draws = [draw(params, mu=float(i)) for i in range(5)]
    together = next_mu(rows, torch.arange(5), draws)
    alone = [float(next_mu(rows[i : i + 1], torch.tensor([i]), draws[i : i + 1])) for i in range(5)]
    assert together.tolist() == alone


def test_whatever_varies_in_number_comes_in_few_shapes():
    seen = set()

    def op(logits, inputs):
        return REFERENCE_OPS["sample"](logits, inputs)

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.add((str(func), tuple(result.shape)))
            return result

    one = Sampler(op, device="cpu", eos_token_ids=(1,), processors={})
    kinds = [SamplingParams(repetition_penalty=1.2, mirostat=2), SamplingParams(dry_multiplier=1)]
    for n in range(9, 17):  # rows that ask for it, and tokens that they hold
        draws = [draw(kinds[i % 2], history=[i, *range(n), i]) for i in range(n)]
        draws += [None] * (16 - n)
        if n == 10:
            seen.clear()
        if n == 16:
            break
        with Watched():
            one(torch.randn(16, VOCAB), draws)
    shapes = {shape[0] for _, shape in seen if len(shape) == 2 and shape[1] == VOCAB}
    assert shapes <= {1, 2, 4, 8, 16}
    cells = {shape[0] for name, shape in seen if name.startswith("aten.index.") and len(shape) == 1}
    assert all(size & (size - 1) == 0 for size in cells), cells
