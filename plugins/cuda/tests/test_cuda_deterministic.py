"""`deterministic` on the simulated device, with Triton's kernels in Triton's interpreter: the same
request gives the same bits alone without overlap, and in chunks in a batch of seven with it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from simdevice import run_on_device

from tokenry.conformance.tiny import FAMILIES, write_model

LANE = Path(__file__).parents[2] / "triton/tests/lane"
HOW = {
    "alone": {"overlap": False, "max_num_seqs": 1, "enable_prefix_caching": False},
    "seven, in chunks, overlapped": {"max_num_seqs": 7, "max_num_batched_tokens": 10},
}
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import triton_interpreter
triton_interpreter.install()
import simdevice
from tokenry import LLM, SamplingParams
from tokenry.errors import ConfigError

model = sys.argv[2]
limits = dict(dtype="float32", max_model_len=48, num_kv_blocks=24, block_size=16, warmup=False,
              backend="cuda", deterministic=True)
prompts = [[(5 * i * i + 7 * i + 3 * n) % 96 for i in range(n)] for n in (7, 3, 2, 5, 4, 3, 1)]
params = [SamplingParams(temperature=0, max_tokens=2, logprobs=2, ignore_eos=True),
          SamplingParams(temperature=0.8, top_p=0.9, seed=7, max_tokens=2, logprobs=2,
                         ignore_eos=True)] + [SamplingParams(temperature=0, max_tokens=1)] * 5
found = {}
for name, how in json.loads(sys.argv[3]).items():
    some = 2 if name == "alone" else 7
    options = ("kernels=triton", "graphs=none")
    with LLM(model, backend_option=options, **limits, **how) as llm:
        done = llm.generate([{"prompt_token_ids": p} for p in prompts[:some]], params[:some],
                            use_tqdm=False)
        claims = llm._assembled.runner._backend.caps.batch_invariant
    found[name] = [
        [c.token_ids, [sorted((t, x.logprob.hex()) for t, x in s.items()) for s in c.logprobs]]
        for c in (d.outputs[0] for d in done[:2])]
    assert claims
try:
    LLM(model, backend_option=("kernels=torch",), **limits)
except ConfigError as error:
    found["refused"] = str(error)
simdevice.report(found)
"""


@pytest.mark.slow
def test_same_request_same_bits(h200, tmp_path):
    pytest.importorskip("triton")
    name, config = next(iter(FAMILIES.items()))
    model = write_model(tmp_path / name, config).path
    env = {**h200, "TRITON_INTERPRET": "1", "SIMDEVICE_DTYPES": "promote"}
    args = [str(LANE), str(model), json.dumps(HOW)]
    found = run_on_device("cuda", SCRIPT, args=args, env=env, timeout_s=300).value
    assert "deterministic=true is for Triton's kernels" in found.pop("refused")
    for name, bits in found.items():
        assert bits == found["alone"], name
    assert found["alone"][0] != found["alone"][1]
