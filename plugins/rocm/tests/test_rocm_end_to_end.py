"""The plugin on a simulated MI300X (a torch built for HIP, whose devices are called cuda): the CPU
backend's tokens from captured graphs, and the facts of the architecture.
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
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = [[(7 * i * i + 3 * i + 1) % VOCAB for i in range(n)] for n in (140, 1, 37)]
SCRIPT = """
import json, sys
from pathlib import Path

import simdevice
import torch
import tokenry_rocm
from tokenry import LLM, SamplingParams

job = json.loads(sys.argv[1])
tokenry_rocm.ROOT = Path(job["root"])
device, found = simdevice.current(), {}
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
prompts = [{"prompt_token_ids": p} for p in job["prompts"]]
for name, model in job["models"].items():
    device.relax()
    options = ("kernels=torch",)
    with LLM(model, backend="rocm", backend_option=options, **job["limits"]) as llm:
        device.strict()
        device.reset_counts()
        tokens = [c.outputs[0].token_ids for c in llm.generate(prompts, greedy, use_tqdm=False)]
        counts, backend = device.counts(), llm._assembled.runner._backend
        found[name] = dict(tokens=tokens, syncs=counts.host_syncs, replays=counts.replays,
                           captures=counts.captures, fp8=backend.caps.fp8,
                           dtypes=backend.caps.dtypes)
simdevice.report(found)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory of each model; `demo` is the story model."""
    root = tmp_path_factory.mktemp("models")
    name, config = next(iter(FAMILIES.items()))
    return {"demo": "demo", name: str(write_model(root / name, config).path)}


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    """What each model gave on the device."""
    root = tmp_path_factory.mktemp("machine")
    node = root / "sys/class/kfd/kfd/topology/nodes/1"
    node.mkdir(parents=True)
    (node / "properties").write_text("simd_count 1216\ngfx_target_version 90402\n")
    (root / "dev").mkdir()
    (root / "dev/kfd").touch()
    job = {"root": str(root), "models": models, "prompts": PROMPTS, "limits": LIMITS}
    env = {"SIMDEVICE_GPU": "MI300X"}
    return run_on_device("cuda", SCRIPT, args=[json.dumps(job)], env=env).value


def test_tokens_are_those_of_the_cpu(models, served):
    for name, model in models.items():
        with LLM(model, backend="cpu", **LIMITS) as llm:
            wanted = [{"prompt_token_ids": p} for p in PROMPTS]
            done = llm.generate(wanted, GREEDY, use_tqdm=False)
        assert served[name]["tokens"] == [list(c.outputs[0].token_ids) for c in done], name


def test_decode_is_replayed_and_no_step_waits(served):
    for name, got in served.items():
        assert got["replays"] >= 7, (name, got)
        assert (got["captures"], got["syncs"]) == (0, 0), (name, got)


def test_fp8_is_of_the_architecture(served):
    assert {got["fp8"] for got in served.values()} == {"e4m3fnuz"}
