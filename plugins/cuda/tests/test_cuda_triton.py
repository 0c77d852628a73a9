"""The plugin with Triton's kernels, in Triton's interpreter (mended, see plugins/triton/tests) on
the simulated device: the CPU backend's tokens. Captures are off, because the interpreter copies
every operand to the host.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from simdevice import run_on_device

LANE = Path(__file__).parents[2] / "triton/tests/lane"
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import triton_interpreter
triton_interpreter.install()
import simdevice
import torch
from tokenry import LLM, SamplingParams

greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
prompts = [{"prompt_token_ids": [(7 * i * i + 3 * i + 1) % 256 for i in range(n)]} for n in (20, 1)]
limits = dict(dtype="float32", max_model_len=48, max_num_seqs=2, max_num_batched_tokens=32,
              num_kv_blocks=8, block_size=16, warmup=False)
found = {}
for name, options in json.loads(sys.argv[2]).items():
    backend = name.partition(" ")[0]
    with LLM("demo", backend=backend, backend_option=tuple(options), **limits) as llm:
        done = llm.generate(prompts, greedy, use_tqdm=False)
        found[name] = dict(
            tokens=[c.outputs[0].token_ids for c in done],
            fallbacks=llm.get_metrics().op_fallbacks,
            quant=sorted(llm._assembled.runner._backend.caps.quant))
simdevice.report(found)
"""


@pytest.mark.slow
def test_tokens_of_triton_s_kernels_are_those_of_the_cpu(h200):
    pytest.importorskip("triton")
    options = ["kernels=triton", "graphs=none"]
    job = {"cpu": [], "cuda": options, "cuda deterministic": [*options, "deterministic=true"]}
    env = {**h200, "TRITON_INTERPRET": "1", "SIMDEVICE_DTYPES": "promote"}
    run = run_on_device("cuda", SCRIPT, args=[str(LANE), json.dumps(job)], env=env, timeout_s=300)
    want = run.value.pop("cpu")["tokens"]
    assert {name: got["tokens"] for name, got in run.value.items()} == dict.fromkeys(
        run.value, want
    )
    assert [got["fallbacks"] for got in run.value.values()] == [{}, {}]
    assert [got["quant"] for got in run.value.values()] == [["int4", "int8"]] * 2
