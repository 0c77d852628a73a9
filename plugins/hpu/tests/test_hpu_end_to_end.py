"""The plugin on the simulated device: the CPU backend's tokens, and no compilation in service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from simdevice import run_on_device

from tokenry import LLM, SamplingParams
from tokenry.conformance.tiny import FAMILIES, VOCAB, write_model

MODES = {"compile": "0", "hpu_graphs": "1", "none": "0"}
LIMITS = {
    "dtype": "float32", "max_model_len": 160, "max_num_seqs": 3, "max_num_batched_tokens": 128,
    "num_kv_blocks": 40, "block_size": 16, "max_programs": 4,
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SCRIPT = """
import json, sys
from dataclasses import asdict
from pathlib import Path

import simdevice
import torch
import tokenry_hpu
from tokenry import LLM, SamplingParams

job = json.loads(sys.argv[1])
tokenry_hpu.ROOT = Path(job["root"])
device, found = simdevice.current(), {}
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
prompts = [{"prompt_token_ids": p} for p in job["prompts"]]
for name, model in job["models"].items():
    device.relax()
    device.reset_counts()
    options = (f"graphs={job['mode']}",)
    with LLM(model, backend="hpu", backend_option=options, **job["limits"]) as llm:
        runner = llm._assembled.runner
        made, counts = runner.compile_count(), device.counts()
        first = [c.outputs[0].token_ids for c in llm.generate(prompts, greedy, use_tqdm=False)]
        recompiles = runner.compile_count() - made
        device.strict()
        steps = llm.get_metrics().steps
        device.reset_counts()
        again = [c.outputs[0].token_ids for c in llm.generate(prompts, greedy, use_tqdm=False)]
        stats = llm.get_metrics()
        found[name] = dict(
            tokens=first, again=again, warm=asdict(counts), serving=asdict(device.counts()),
            syncs=device.counts().host_syncs, steps=stats.steps - steps,
            programs=stats.programs, fallbacks=stats.op_fallbacks,
            recompiles=recompiles, ledger=dict(llm.ready.ledger))
    del runner
simdevice.report(found)
"""


def prompts(vocab):
    """Three requests: longer than a step's tokens, one token, and in between."""
    return [[(7 * i * i + 3 * i + 1) % vocab for i in range(n)] for n in (140, 1, 37)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory of each model."""
    root = tmp_path_factory.mktemp("models")
    tiny = {name: write_model(root / name, config).path for name, config in FAMILIES.items()}
    return {"demo": "demo", **{name: str(path) for name, path in tiny.items()}}


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A file tree with a Gaudi 2."""
    root: Path = tmp_path_factory.mktemp("machine")
    (root / "dev/accel").mkdir(parents=True)
    (root / "dev/accel/accel0").touch()
    facts = root / "sys/class/accel/accel0/device"
    facts.mkdir(parents=True)
    (facts / "vendor").write_text("0x1da3\n")
    (facts / "device").write_text("0x1020\n")
    return root


@pytest.fixture(scope="module")
def expected(models):
    """The CPU backend's tokens."""
    found = {}
    for name, model in models.items():
        limits = {k: v for k, v in LIMITS.items() if k != "max_programs"}
        with LLM(model, backend="cpu", **limits) as llm:
            wanted = [{"prompt_token_ids": p} for p in prompts(VOCAB)]
            done = llm.generate(wanted, GREEDY, use_tqdm=False)
            found[name] = [list(c.outputs[0].token_ids) for c in done]
    return found


@pytest.fixture(scope="module", params=MODES)
def served(request, models, machine):
    """What each model gave on the device, in one of the modes."""
    job = {
        "root": str(machine), "models": models, "prompts": prompts(VOCAB), "limits": LIMITS,
        "mode": request.param,
    }  # fmt: skip
    env = {"PT_HPU_LAZY_MODE": MODES[request.param]}
    run = run_on_device("hpu", SCRIPT, args=[json.dumps(job)], env=env)
    return request.param, run.value


def test_tokens_are_those_of_the_cpu(served, expected):
    _, found = served
    assert {name: got["tokens"] for name, got in found.items()} == expected
    assert {name: got["again"] for name, got in found.items()} == expected


def test_nothing_is_compiled_in_service(served):
    _, found = served
    for name, got in found.items():
        assert got["programs"] == 4, name
        assert got["recompiles"] == 0, (name, got)
        assert all(got["serving"][kind] == 0 for kind in ("programs", "captures", "recipes")), name


def test_the_programs_are_of_the_mode(served):
    mode, found = served
    for name, got in found.items():
        warm = got["warm"]
        assert warm["programs"] == (4 if mode == "compile" else 0), (name, warm)
        assert warm["captures"] == (4 if mode == "hpu_graphs" else 0), (name, warm)


def test_a_step_never_waits_but_for_its_result(served):
    _, found = served
    for name, got in found.items():
        assert got["syncs"] == 0, (name, got)
        assert got["serving"]["async_copies_to_host"] <= 4 * got["steps"], (name, got)


def test_no_op_is_left_to_the_reference(served):
    _, found = served
    assert [got["fallbacks"] for got in found.values()] == [{}] * len(found)
