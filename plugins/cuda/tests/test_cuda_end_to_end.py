"""The plugin on the simulated device: the CPU backend's tokens, decode from captured graphs, no
capture in service and no host wait in a step.
"""

from __future__ import annotations

import json

import pytest
from simdevice import run_on_device

from tokenry import LLM, SamplingParams
from tokenry.conformance.tiny import FAMILIES, VOCAB, write_model

LIMITS = {
    "dtype": "float32", "max_model_len": 160, "max_num_seqs": 3, "max_num_batched_tokens": 128,
    "num_kv_blocks": 40, "block_size": 16,
}  # fmt: skip
HOW = {"capture": [], "decode": ["graph_tokens=0"], "none": ["graphs=none"]}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SCRIPT = """
import json, sys
from dataclasses import asdict

import simdevice
import torch
from tokenry import LLM, SamplingParams

job = json.loads(sys.argv[1])
device, found = simdevice.current(), {}
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
prompts = [{"prompt_token_ids": p} for p in job["prompts"]]
options = ("kernels=torch", *job["options"])
for name, model in job["models"].items():
    device.relax()
    device.reset_counts()
    with LLM(model, backend="cuda", backend_option=options, **job["limits"]) as llm:
        runner = llm._assembled.runner
        made, warm = runner.compile_count(), device.counts()
        first = [c.outputs[0].token_ids for c in llm.generate(prompts, greedy, use_tqdm=False)]
        device.strict()
        steps = llm.get_metrics().steps
        device.reset_counts()
        again = [c.outputs[0].token_ids for c in llm.generate(prompts, greedy, use_tqdm=False)]
        stats, counts = llm.get_metrics(), device.counts()
        found[name] = dict(
            tokens=first, again=again, warm=asdict(warm), serving=asdict(counts),
            syncs=counts.host_syncs, steps=stats.steps - steps, programs=stats.programs,
            fallbacks=stats.op_fallbacks, recompiles=runner.compile_count() - made,
            ledger=dict(llm.ready.ledger), peak=device.memory().peak_bytes,
            allocated=device.memory().allocated_bytes)
    del runner
simdevice.report(found)
"""


def prompts(vocab):
    """Three requests: longer than a step's tokens, one token, and in between."""
    return [[(7 * i * i + 3 * i + 1) % vocab for i in range(n)] for n in (140, 1, 37)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory of each model; `demo` is the story model."""
    root = tmp_path_factory.mktemp("models")
    tiny = {name: write_model(root / name, config).path for name, config in FAMILIES.items()}
    return {"demo": "demo", **{name: str(path) for name, path in tiny.items()}}


@pytest.fixture(scope="module")
def expected(models):
    """The CPU backend's tokens."""
    found = {}
    for name, model in models.items():
        with LLM(model, backend="cpu", **LIMITS) as llm:
            wanted = [{"prompt_token_ids": p} for p in prompts(VOCAB)]
            done = llm.generate(wanted, GREEDY, use_tqdm=False)
            found[name] = [list(c.outputs[0].token_ids) for c in done]
    return found


@pytest.fixture(scope="module", params=["capture", "decode", "none"])
def served(request, models, h200):
    """What each model gave on the device, captured and not."""
    how = HOW[request.param]
    job = {"models": models, "prompts": prompts(VOCAB), "limits": LIMITS, "options": how}
    return request.param, run_on_device("cuda", SCRIPT, args=[json.dumps(job)], env=h200).value


def test_tokens_are_those_of_the_cpu(served, expected):
    _, found = served
    assert {name: got["tokens"] for name, got in found.items()} == expected
    assert {name: got["again"] for name, got in found.items()} == expected


def test_programs_are_captured_in_warm_up_only(served):
    graphs, found = served
    for name, got in found.items():
        captured = got["programs"]
        # of 3 sequences and 128 tokens: 3 decode sizes (1, 2, 3), 15 of mixed steps
        assert captured == {"capture": 18, "decode": 3, "none": 0}[graphs], name
        assert got["warm"]["captures"] == captured, (name, got["warm"])
        assert (got["recompiles"], got["serving"]["captures"]) == (0, 0), name


def test_steps_are_replays(served):
    how, found = served
    for name, got in found.items():
        replays, steps = got["serving"]["replays"], got["steps"]
        # one step has the prompts, with 128 tokens at most: it is captured by default, too
        prompts_only = {"capture": 0, "decode": 1, "none": steps}[how]
        assert replays == steps - prompts_only, (name, got)


def test_a_step_never_waits_and_brings_back_one_copy(served):
    _, found = served
    for name, got in found.items():
        assert got["syncs"] == 0, (name, got)
        assert got["serving"]["async_copies_to_host"] == got["steps"], (name, got)


def test_no_op_is_left_to_the_reference(served):
    _, found = served
    assert [got["fallbacks"] for got in found.values()] == [{}] * len(found)


def test_graphs_are_in_the_ledger(served):
    graphs, found = served
    for name, got in found.items():
        assert (got["ledger"]["programs"] > 0) == (graphs != "none"), (name, got["ledger"])
