"""Whatever a request asks of sampling and scores, no step waits for the device: neither a read nor
an upload that torch would wait for (its small tensors of Python numbers are such).
"""

from __future__ import annotations

import pytest
from simdevice import run_on_device

SCRIPT = """
from dataclasses import asdict

import simdevice
import torch
from tokenry import LLM, SamplingParams
from tokenry.params import Watermark

device = simdevice.current()
asked = [
    dict(temperature=0), dict(), dict(top_k=5, top_p=0.9, min_p=0.01), dict(logprobs=3),
    dict(temperature=0, prompt_logprobs=2, logprobs=0), dict(repetition_penalty=1.2),
    dict(presence_penalty=0.5, frequency_penalty=0.5), dict(logit_bias={5: 2.0}),
    dict(allowed_token_ids=(3, 4, 5)), dict(bad_words=("the",), min_tokens=2, ignore_eos=False),
    dict(typical_p=0.9), dict(top_n_sigma=1.0), dict(xtc_probability=0.5, xtc_threshold=0.05),
    dict(mirostat=2), dict(dry_multiplier=0.8, no_repeat_ngram_size=2),
    dict(watermark=Watermark(scheme="kgw", key=3)), dict(watermark=Watermark(scheme="gumbel")),
]
params = [SamplingParams(**{"max_tokens": 4, "ignore_eos": True, "seed": i, **one})
          for i, one in enumerate(asked)]
limits = dict(dtype="float32", max_model_len=64, max_num_seqs=len(params), num_kv_blocks=80)
found = {}
options = ("kernels=torch", "graphs=none")
with LLM("demo", backend="cuda", backend_option=options, **limits) as llm:
    for which in ("first", "again"):
        device.reset_counts()
        done = llm.generate(["Once upon a time"] * len(params), params, use_tqdm=False)
        found[which] = asdict(device.counts())
        assert all(len(c.outputs[0].token_ids) == 4 for c in done)
    found["steps"] = llm.get_metrics().steps
simdevice.report(found)
"""


@pytest.mark.slow
def test_no_step_waits_whatever_is_asked_for(h200):
    found = run_on_device("cuda", SCRIPT, env=h200).value
    assert found["steps"] > 6
    for which in ("first", "again"):
        counts = found[which]
        waits = ("scalar_reads", "shape_reads", "copies_to_host", "waited_copies_to_device")
        assert {name: counts[name] for name in waits} == dict.fromkeys(waits, 0), which
        assert counts["copies_to_device"] > found["steps"] // 2
