"""What only a real GPU can prove, for whichever GPU backend can run here; skipped where none can.

    python -m pytest tests/gpu plugins/cuda/tests/test_cuda_conformance.py

$GPU_TEST_OPTIONS has `--backend-option`s for all of them ("kernels=torch graph_tokens=0"). The
tests themselves are tried on the simulated device (plugins/cuda/tests/test_cuda_gpu_suite.py).
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch

from tokenry import LLM, SamplingParams
from tokenry.backend.discovery import discover
from tokenry.conformance.tiny import FAMILIES, VOCAB, write_model
from tokenry.errors import ConfigError, StepFailed

pytestmark = pytest.mark.gpu

OPTIONS = tuple(os.environ.get("GPU_TEST_OPTIONS", "").split())
LIMITS = {
    "dtype": "float32", "max_model_len": 160, "max_num_seqs": 8, "max_num_batched_tokens": 256,
    "num_kv_blocks": 90, "block_size": 16,
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=7, max_tokens=16, ignore_eos=True)
SCORED = SamplingParams(
    temperature=0.9, seed=3, logprobs=3, prompt_logprobs=1, max_tokens=16, ignore_eos=True
)
NARROWED = SamplingParams(
    typical_p=0.9, mirostat=2, allowed_token_ids=tuple(range(5, 60)), repetition_penalty=1.1,
    seed=4, max_tokens=16, ignore_eos=True,
)  # fmt: skip
PROMPTS = [[(7 * i * i + 3 * i + 1) % VOCAB for i in range(n)] for n in (140, 1, 37, 16, 17, 64)]


@pytest.fixture(scope="module")
def gpu():
    """Name of the backend."""
    usable = [p.backend for p in discover() if p.state == "usable"]
    found = [name for name in usable if name in ("cuda", "rocm")]
    if not found:
        pytest.skip("no GPU can be used here (`tokenry devices` says why)")
    if torch.version.cuda is None and torch.version.hip is None:
        pytest.skip("the installed torch is for the CPU only")
    return found[0]


@pytest.fixture(autouse=True)
def collected():
    """What an engine or a caught error of the last test still holds is given back."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory of each model; `demo` is the story model."""
    root = tmp_path_factory.mktemp("models")
    tiny = {name: str(write_model(root / name, config).path) for name, config in FAMILIES.items()}
    return {"demo": "demo", **tiny}


def tokens(llm, params=GREEDY):
    """Of the answers to PROMPTS."""
    asked = [{"prompt_token_ids": p} for p in PROMPTS]
    done = llm.generate(asked, params, use_tqdm=False)
    return [list(c.outputs[0].token_ids) for c in done]


@pytest.mark.parametrize("graphs", ["capture", "none"])
@pytest.mark.parametrize("name", ["demo", *FAMILIES])
def test_greedy_tokens_are_those_of_the_cpu_replayed_and_not(gpu, models, name, graphs):
    with LLM(models[name], backend="cpu", **LIMITS) as llm:
        want = tokens(llm)
    options = (*OPTIONS, f"graphs={graphs}")
    with LLM(models[name], backend=gpu, backend_option=options, **LIMITS) as llm:
        assert tokens(llm) == want
        made = llm._assembled.runner.compile_count()
        assert tokens(llm) == want
        assert llm._assembled.runner.compile_count() == made


@pytest.mark.parametrize(
    "params", [GREEDY, DRAWN, SCORED, NARROWED], ids=["greedy", "drawn", "scored", "narrowed"]
)
def test_a_step_never_waits_for_the_device(gpu, params):
    with LLM("demo", backend=gpu, backend_option=OPTIONS, **LIMITS) as llm:
        want = tokens(llm, params)
        llm.reset_prefix_cache()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert tokens(llm, params) == want
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_overlap_changes_no_token(gpu):
    found = []
    for overlap in (True, False):
        with LLM("demo", backend=gpu, backend_option=OPTIONS, overlap=overlap, **LIMITS) as llm:
            found.append((tokens(llm), tokens(llm, DRAWN)))
    assert found[0] == found[1]


def test_the_deterministic_mode_gives_the_same_bits_alone_and_in_a_batch(gpu):
    """Or says that these kernels cannot."""
    options = {"backend": gpu, "backend_option": OPTIONS, "deterministic": True, **LIMITS}
    if "kernels=torch" in OPTIONS:
        with pytest.raises(ConfigError, match="for Triton's kernels"):
            LLM("demo", **options)
        return
    asked = [{"prompt_token_ids": p} for p in PROMPTS]
    with LLM("demo", enable_prefix_caching=False, **options) as llm:
        together = llm.generate(asked, SCORED, use_tqdm=False)
        alone = [llm.generate(one, SCORED, use_tqdm=False)[0] for one in asked]
    for one, other in zip(alone, together, strict=True):
        a, b = one.outputs[0], other.outputs[0]
        assert a.token_ids == b.token_ids
        assert [{t: x.logprob for t, x in step.items()} for step in a.logprobs] == [
            {t: x.logprob for t, x in step.items()} for step in b.logprobs
        ]


def fill():
    """All memory of the device that can still be had, in pieces down to 4 KiB."""
    torch.cuda.empty_cache()
    held, size = [], torch.cuda.mem_get_info()[0]
    while size >= 4096:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    return held


def test_the_engine_goes_on_after_a_step_that_did_not_fit(gpu):
    options = (*OPTIONS, "graph_tokens=0")
    with LLM("demo", backend=gpu, backend_option=options, **LIMITS) as llm:
        want = tokens(llm)
        llm.reset_prefix_cache()
        held = fill()
        # in the model: DeviceOOM; where the core copies inputs or draws: torch's own words
        with pytest.raises(StepFailed, match=r"No memory for|out of memory"):
            tokens(llm)
        held.clear()
        torch.cuda.empty_cache()
        assert tokens(llm) == want


def test_what_is_used_is_what_was_planned(gpu):
    with LLM(
        "demo", backend=gpu, backend_option=OPTIONS, dtype="bfloat16", max_num_seqs=16,
        max_num_batched_tokens=128, max_model_len=256, memory_fraction=0.5,
    ) as llm:  # fmt: skip
        ledger = dict(llm.ready.ledger)
        asked = [{"prompt_token_ids": PROMPTS[i % 6] + [i]} for i in range(32)]
        llm.generate(asked, DRAWN, use_tqdm=False)
        free, total = torch.cuda.mem_get_info()
    planned = sum(ledger.values())
    assert total - free <= 1.03 * planned + (64 << 20), ledger


def test_an_address_that_is_none_is_one_clear_cause(gpu):
    """In a process of its own, whose context is lost with it."""
    script = """
import sys, torch
from tokenry.errors import DeviceLost
from tokenry_triton.gpu.memory import typed_errors
if "simulated" in torch.cuda.get_device_name(0):
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")
    error.error_code = 710
    def fail(): raise error
else:
    def fail():
        torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]
        torch.cuda.synchronize()
try:
    with typed_errors("a step", 0):
        fail()
except DeviceLost as error:
    print(error.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert "failed in a step and cannot be used" in done.stdout, done.stderr[-2000:]
    assert "assert" in done.stdout


@pytest.mark.slow
def test_a_thousand_random_steps_make_no_program(gpu):
    if "simulated" in torch.cuda.get_device_name(0):
        pytest.skip("the conformance kit does it there, with fewer steps")
    command = [sys.executable, "-m", "tokenry", "conform", gpu, "--only", "C10", "--steps", "1000"]
    for option in OPTIONS:
        command += ["--backend-option", option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
