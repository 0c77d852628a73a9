"""Memory is planned with steps that hold what real ones do and compute little of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tokenry import LLM, SamplingParams
from tokenry_cpu import program
from tokenry_cpu.rehearsal import Rehearsal

MEASURE = """
import json, sys
from tokenry import LLM
from tokenry_cpu import backend

if sys.argv[3] == "whole":
    made = backend.recorded
    backend.recorded = lambda step, planning: made(step)
with LLM(sys.argv[1], backend="cpu", tokenizer="demo", load_format="dummy", progress=False,
         quantization=sys.argv[2] or None, max_num_batched_tokens=8192, backend_option=["threads=2"]
         ) as llm:
    print(json.dumps(llm.ready.ledger))
"""
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32",
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 1024, "vocab_size": 4096,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 4,
}  # fmt: skip


def planned(directory, quantization, how):
    """Bytes that the ledger has for activations, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(directory), quantization, how],
        check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout)["activations"]


@pytest.mark.slow
def test_a_rehearsed_step_is_planned_the_memory_of_a_whole_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    whole, few = (planned(tmp_path, "int4", how) for how in ("whole", "few"))
    assert whole > 30 * 2**20
    assert 0.94 * whole < few < 1.2 * whole  # the heap differs by some MiB from start to start


def test_the_program_of_a_rehearsal_is_one_layer_with_narrow_linears(monkeypatch):
    made, record = [], program._record

    def watched(*args):
        made.append(record(*args))
        return made[-1]

    monkeypatch.setattr(program, "_record", watched)
    with LLM("demo", backend="cpu", max_model_len=64, progress=False):
        (whole,) = made
        rehearsal = Rehearsal(whole._noted, whole._instructions, whole._call)
    few = rehearsal.call.count
    layers = sum(one.op == program.ATTEND for one in whole._noted)
    assert layers > 1 and few < len(whole._noted) / layers + 8
    kept = [rehearsal._instructions[i].op for i in range(few)]
    assert kept.count(program.ATTEND) == 1 and kept.count(program.LINEAR) == 5
    outputs = {weight.out_features for weight in rehearsal._held}
    assert max(outputs) <= 32 * torch.get_num_threads()


def test_only_planning_is_rehearsed(monkeypatch):
    """The tokens after a planned start are those of a start that planned nothing."""
    ran, rehearse = [], program.Program.rehearse

    def watched(self, batch, kv):
        ran.append(1)
        return rehearse(self, batch, kv)

    monkeypatch.setattr(program.Program, "rehearse", watched)
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

    def tokens(**config):
        with LLM("demo", backend="cpu", max_model_len=64, progress=False, **config) as llm:
            before = len(ran)
            out = llm.generate("Once upon a time", params, use_tqdm=False)
            assert len(ran) == before
        return out[0].outputs[0].token_ids

    assert tokens() == tokens(num_kv_blocks=64)
    assert ran
