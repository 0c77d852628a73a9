import random

import pytest
import torch
from drive import GREEDY, Driver

from tokenry.backend.discovery import choose, discover, open_backend
from tokenry.params import SamplingParams

BACKENDS = ["cpu", "sim-cuda", "sim-hpu", "sim-neuron", "sim-opaque"]
PROMPTS = {"a": [5, 9, 11], "b": list(range(2, 25)), "c": [3] * 7, "d": [40]}


def staggered(runner, *, overlap=False):
    """Prompts that arrive late and in chunks beside decodes; the tokens of each request."""
    driver = Driver(runner)
    for name, prompt in PROMPTS.items():
        driver.add(name, prompt)
    schedule = [
        {"a": 3, "b": 10},
        {"a": 1, "b": 13, "c": 4},
        {"a": 1, "b": 1, "c": 3, "d": 1},
        *[{"a": 1, "b": 1, "c": 1, "d": 1}] * 8,
        {"b": 1},
        {"d": 1, "b": 1},
    ]
    tokens = {name: [] for name in PROMPTS}
    waiting = []
    for shares in schedule:
        waiting.append(driver.launch(shares))
        while len(waiting) > int(overlap):
            for row in waiting.pop(0)().rows:
                assert row.error is None
                tokens[row.request_id] += row.token_ids
    for wait in waiting:
        for row in wait().rows:
            tokens[row.request_id] += row.token_ids
    return tokens


@pytest.fixture(scope="module")
def _reference_tokens():
    return {}


@pytest.mark.parametrize("overlap", [False, True], ids=["waited", "overlapped"])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_gives_the_same_tokens(make_runner, _reference_tokens, name, overlap):
    tokens = staggered(make_runner(name), overlap=overlap)
    assert [len(t) for t in tokens.values()] == [11, 12, 9, 10]
    assert tokens == _reference_tokens.setdefault("tokens", tokens)


@pytest.mark.parametrize("name", ["sim-cuda", "sim-hpu", "sim-neuron"])
def test_nothing_compiles_after_warm_up(make_runner, name):
    runner = make_runner(name)
    made = runner.compile_count()
    assert made > 0
    rng = random.Random(0)
    driver = Driver(runner)
    left = {}
    for step in range(80):
        if len(left) < 4 and rng.random() < 0.5:
            length = rng.randrange(1, 40)
            driver.add(f"r{step}", [rng.randrange(2, 60) for _ in range(length)])
            left[f"r{step}"] = length
        shares = {}
        budget = 32
        for request, gap in left.items():
            count = min(gap, budget, rng.choice((1, 7, 32)))
            if count:
                shares[request] = count
                budget -= count
        if not shares:
            continue
        for request, row in driver.run(shares).items():
            assert row.error is None
            left[request] = driver.known[request] - driver.computed[request]
        for request in [r for r in left if driver.computed[r] > 55 or rng.random() < 0.05]:
            driver.drop(request)
            del left[request]
    assert runner.compile_count() == made
    if name == "sim-cuda":
        assert runner.stats()[1] > 0, "mixed steps run uncompiled, and are counted"


def test_prompt_logprobs_are_those_of_the_whole_prompt(make_runner):
    params = SamplingParams(temperature=0, prompt_logprobs=2, logprobs=3)
    found = {}
    for name in BACKENDS:
        driver = Driver(make_runner(name))
        driver.add("p", PROMPTS["b"], params)
        driver.add("other", [7, 8, 9])
        rows = [driver.run({"p": 9, "other": 3}), driver.run({"p": 14, "other": 1})]
        scored = [s for row in rows for s in row["p"].prompt_logprobs]
        assert [s.token_ids[0] for s in scored] == PROMPTS["b"][1:]
        assert all(len(s.token_ids) == 3 and s.rank >= 1 for s in scored)
        last = rows[1]["p"]
        assert last.logprobs[0].token_ids[0] == last.token_ids[0]
        assert last.logprobs[0].logprobs[0] == last.logprobs[0].logprobs[1]
        found[name] = [s.logprobs[0] for s in scored]
    for name in BACKENDS:
        assert found[name] == pytest.approx(found["cpu"], abs=1e-4)


def test_a_failed_step_costs_its_requests_and_no_others(make_runner):
    backend = open_backend(choose(discover("cpu"), "cpu"), {})
    runner = make_runner(backend=backend)
    want = staggered(make_runner())["a"]
    driver = Driver(runner)
    driver.add("a", PROMPTS["a"])
    driver.add("lost", [7, 8])
    got = [*driver.run({"a": 3})["a"].token_ids]
    step = runner._programs._step

    def broken(batch):
        raise RuntimeError("planted")

    runner._programs._step = broken
    with pytest.raises(RuntimeError, match="planted"):
        driver.run({"lost": 2})
    runner._programs._step = step
    rows = driver.run({"lost": 1, "a": 1})
    assert rows["lost"].error is not None
    got += rows["a"].token_ids
    driver.drop("lost")
    for _ in range(4):
        got += driver.run({"a": 1})["a"].token_ids
    assert got == want[: len(got)]


def test_a_row_of_nan_fails_alone(make_runner):
    runner = make_runner()
    step = runner._programs._step

    def poisoned(batch):
        logits = step(batch)
        logits[0] = torch.nan
        return logits

    runner._programs._step = poisoned
    driver = Driver(runner)
    driver.add("bad", [5, 6])
    driver.add("fine", [7, 8])
    rows = driver.run({"bad": 2, "fine": 2})
    assert "NaN" in rows["bad"].error
    assert rows["fine"].error is None
    assert len(rows["fine"].token_ids) == 1


def test_a_request_may_come_back_with_its_output_as_prompt(make_runner):
    want = staggered(make_runner())["b"]
    driver = Driver(make_runner())
    driver.add("again", [*PROMPTS["b"], *want[:4]], GREEDY)
    got = [*driver.run({"again": 27})["again"].token_ids]
    got += driver.run({"again": 1})["again"].token_ids
    assert got == want[4:6]


def test_a_logits_processor_sees_the_history_and_changes_the_row(make_runner):
    seen = []

    def factory(args):
        def force(history, logits):
            seen.append(history.tolist())
            out = torch.full_like(logits, -torch.inf)
            out[args["token"]] = 0
            return out

        return force

    driver = Driver(make_runner(processors={"force": factory}))
    params = SamplingParams(temperature=0, logits_processor="force", extra_args={"token": 33})
    driver.add("f", [4, 5], params)
    driver.add("plain", [4, 5])
    rows = driver.run({"f": 2, "plain": 2})
    assert rows["f"].token_ids == (33,)
    assert rows["plain"].token_ids != (33,)
    assert seen == [[4, 5]]
