"""What a row brings with it (processor, parameters, logits) costs that row at most; warm-up runs
what a step runs.
"""

from dataclasses import replace

import pytest
import torch
from drive import Driver

from tokenry.backend.discovery import choose, discover, open_backend
from tokenry.backend.reference import REFERENCE_OPS, ReferenceOp
from tokenry.params import SamplingParams


def counting(args):
    """A processor with a memory: forces token 30 on its first call, 31 on the second, ..."""
    calls = []

    def force(history, logits):
        calls.append(len(history))
        out = torch.full_like(logits, -torch.inf)
        out[29 + len(calls)] = 0
        return out

    return force


def failing(args):
    def fail(history, logits):
        raise ValueError("planted in a processor")

    return fail


def refusing(args):
    raise ValueError(f"planted in a factory: {args['why']}")


PROCESSORS = {"counting": counting, "failing": failing, "refusing": refusing}


def processed(name, **args):
    return SamplingParams(temperature=0, logits_processor=name, extra_args=args)


def test_a_processor_is_made_once_for_each_request(make_runner):
    driver = Driver(make_runner(processors=PROCESSORS))
    driver.add("p", [4, 5], processed("counting"))
    driver.add("q", [6], processed("counting"))
    first = driver.run({"p": 2})
    both = driver.run({"p": 1, "q": 1})
    assert first["p"].token_ids == (30,)
    assert both["p"].token_ids == (31,)
    assert both["q"].token_ids == (30,)


@pytest.mark.parametrize(
    ("params", "told"),
    [
        (processed("failing"), "planted in a processor"),
        (processed("refusing", why="no grammar"), "no grammar"),
        (processed("absent"), "installed: counting, failing, refusing"),
    ],
    ids=["raises", "cannot be made", "unknown"],
)
def test_a_bad_processor_fails_its_row_alone(make_runner, params, told):
    alone = Driver(make_runner())
    alone.add("fine", [7, 8])
    want = alone.run({"fine": 2})["fine"].token_ids
    driver = Driver(make_runner(processors=PROCESSORS))
    driver.add("bad", [5, 6], params)
    driver.add("fine", [7, 8])
    rows = driver.run({"bad": 2, "fine": 2})
    assert told in rows["bad"].error
    assert rows["bad"].token_ids == ()
    assert rows["fine"].token_ids == want


def test_more_top_k_than_the_device_draws_from_is_told_to_its_request(make_runner):
    driver = Driver(make_runner("sim-neuron"))
    driver.add("wide", [5, 6], SamplingParams(top_k=257))
    driver.add("fine", [7, 8], SamplingParams(top_k=256))
    rows = driver.run({"wide": 2, "fine": 2})
    assert "top_k 257" in rows["wide"].error
    assert "256" in rows["wide"].error
    assert rows["fine"].error is None


def test_infinite_logits_are_an_error_as_nan_is(make_runner):
    runner = make_runner()
    step = runner._programs._step

    def overflowing(batch):
        logits = step(batch)
        logits[0, 3] = torch.inf
        return logits

    runner._programs._step = overflowing
    driver = Driver(runner)
    driver.add("bad", [5, 6], SamplingParams(temperature=1.0))
    driver.add("fine", [7, 8], SamplingParams(temperature=1.0))
    rows = driver.run({"bad": 2, "fine": 2})
    assert "overflow" in rows["bad"].error
    assert rows["fine"].error is None


def silencing(args):
    return lambda history, logits: torch.full_like(logits, args["value"])


@pytest.mark.parametrize(
    ("params", "refused"),
    [
        (SamplingParams(allowed_token_ids=(5,), stop_token_ids=(5,), min_tokens=2), True),
        (SamplingParams(temperature=0, allowed_token_ids=(9,), bad_words_ids=((9,),)), True),
        (processed("silencing", value=-torch.inf), False),
        (processed("silencing", value=torch.nan), False),
    ],
    ids=["min_tokens", "bad_words", "processor", "nan"],
)
def test_a_row_that_may_draw_nothing_is_an_error_and_no_token(make_runner, params, refused):
    driver = Driver(make_runner(processors={"silencing": silencing}))
    driver.add("bad", [5, 6], params)
    driver.add("fine", [7, 8], SamplingParams(temperature=1.0, allowed_token_ids=(5,)))
    rows = driver.run({"bad": 2, "fine": 2})
    assert "nothing may be drawn" in rows["bad"].error
    assert (rows["bad"].refusal is not None) == refused
    assert rows["bad"].token_ids == ()
    assert rows["fine"].token_ids == (5,)


class SpyingSample(ReferenceOp):
    """The reference, and a list of what it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, logits, inputs):
        self.asked.append(
            (len(logits), inputs.all_greedy, inputs.any_filter, torch.is_inference_mode_enabled())
        )
        return REFERENCE_OPS["sample"](logits, inputs)


@pytest.mark.parametrize("name", ["cpu", "sim-cuda", "sim-hpu", "sim-neuron"])
def test_warm_up_draws_in_every_way_that_a_step_draws(make_runner, name):
    backend = open_backend(choose(discover(name), name), {})
    spy = SpyingSample()
    own = dict(backend.ops())
    backend.ops = lambda: own | {"sample": spy}
    runner = make_runner(backend=backend)
    ways = {(greedy, filtered) for _, greedy, filtered, _ in spy.asked}
    assert ways == {(True, False), (False, False), (False, True)}
    assert all(inference for *_, inference in spy.asked)
    if not backend.caps.shapes.static:
        return
    warmed = {asked[:3] for asked in spy.asked}
    spy.asked.clear()
    driver = Driver(runner)
    driver.add("a", [5, 6, 7], SamplingParams(temperature=0.9, top_p=0.8))
    driver.add("b", [5, 6, 7], SamplingParams(temperature=0.9))
    driver.add("scored", [5, 6, 7] * 7, SamplingParams(temperature=0, prompt_logprobs=1))
    driver.run({"a": 3, "b": 3, "scored": 21})
    driver.run({"a": 1, "b": 1, "scored": 1})
    driver.run({"b": 1})
    driver.run({"scored": 1})
    assert {asked[:3] for asked in spy.asked} <= warmed


def test_prompts_of_a_device_that_cannot_continue_one_are_scored_in_one_launch(make_runner):
    params = SamplingParams(temperature=0, prompt_logprobs=2)
    prompt = [2 + i % 50 for i in range(30)]
    scores = {}
    for name in ("cpu", "sim-hpu"):
        backend = open_backend(choose(discover(name), name), {})
        if name == "sim-hpu":
            backend.caps = replace(backend.caps, phases=replace(backend.caps.phases, chunked=False))
        runner = make_runner(backend=backend)
        seen = []
        run = runner._programs.run
        runner._programs.run = lambda batch, run=run, seen=seen: seen.append(batch) or run(batch)
        driver = Driver(runner)
        driver.add("p", prompt, params)
        row = driver.run({"p": 30})["p"]
        assert len(row.prompt_logprobs) == 29
        scores[name] = [s.logprobs[0] for s in row.prompt_logprobs]
        assert len(seen) == 1
    # unscaled random weights: scores of hundreds, so that any two kernels differ by some 1e-4
    assert scores["sim-hpu"] == pytest.approx(scores["cpu"], abs=1e-3)


def test_no_feedback_outlives_the_step_after_it(make_runner):
    driver = Driver(make_runner())
    driver.add("a", [4, 5])
    driver.add("b", [6, 7, 8])
    waits = [driver.launch({"a": 2, "b": 3}), driver.launch({"b": 1})]
    late = driver.launch({"a": 1})  # a step too late: nobody has waited for a's token
    assert late().rows[0].error is not None
    assert all(row.error is None for wait in waits for row in wait().rows)
