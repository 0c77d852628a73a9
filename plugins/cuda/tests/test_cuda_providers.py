"""FlashAttention and FlashInfer before the own attention, on the simulated device, with stand-ins
that take and refuse what the real functions do. The real libraries have never been run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from simdevice import run_on_device

from tokenry.errors import ConfigError
from tokenry_triton.gpu.options import GpuOptions

STANDINS = Path(__file__).parent / "standins"
BEGIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
job = json.loads(sys.argv[2])
import simdevice
import torch
import standin_paged
from tokenry.backend.contract import DeviceRef
from tokenry.conformance.attention import trial
from tokenry.conformance.paged import AttentionCase
from tokenry.errors import ConfigError
from tokenry_triton.gpu.choice import Gpu
from tokenry_triton.gpu.backend import GpuBackend
from tokenry_triton.gpu.options import GpuOptions
from tokenry_cuda.providers import PROVIDERS

def opened(name, arch="sm_90", **options):
    gpu = Gpu(backend="cuda", index=0, arch=arch, dtypes=("bfloat16", "float16", "float32"),
              fp8="e4m3fn", attention=PROVIDERS)
    chosen = {"kernels": "torch", "attention": name} | options
    return GpuBackend(gpu, GpuOptions.parse("cuda", chosen))
"""
MIXED = [[0, 17], [16, 1], [15, 3], [0, 1], [3, 21]]
DECODE = [[1, 1], [15, 1], [16, 1], [53, 1]]
LONG = [[255, 1], [256, 1]]
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
CASES = [
    {"works": MIXED},
    {"works": DECODE, "spare": True},
    {"works": MIXED, "dtype": "float16", "window": 5, "spare": True},
    {"works": DECODE, "window": 17},
    {"works": MIXED, "softcap": 2.0},
    {"works": DECODE, "softcap": 2.0},
    {"works": DECODE, "head_dim": 80},
    {"works": DECODE, "dtype": "float32"},
]


def on_device(h200, script, job, env=None):
    args = [str(STANDINS), json.dumps(job)]
    more = {"SIMDEVICE_DTYPES": "promote"} | (env or {})
    return run_on_device("cuda", BEGIN + script, args=args, env={**h200, **more}).value


TRY = """
found = {}
for name, arch, cases in job["tried"]:
    backend = opened(name, arch)
    rows = found[f"{name} {arch}"] = []
    for case in cases:
        standin_paged.CALLS.clear()
        case = {"dtype": "bfloat16", "block_size": backend.caps.block_sizes[0]} | case
        works = tuple(map(tuple, case.pop("works")))
        wrong = trial(backend, AttentionCase(works=works, **job["heads"] | case))
        rows.append([wrong, dict(standin_paged.CALLS)])
found["pages"] = {arch: opened("flash", arch).caps.block_sizes for arch in ("sm_80", "sm_90")}
"""
REFUSALS = """
q = torch.zeros(2, 4, 64, dtype=torch.float16, device="cuda")
kv = torch.zeros(2, 3, 16, 2, 64, dtype=torch.float16, device="cuda")
table = torch.ones(2, 2, dtype=torch.int32, device="cuda")
lens = torch.ones(2, dtype=torch.int32, device="cuda")
workspace = torch.zeros(32 << 20, dtype=torch.uint8, device="cuda")
import flash_attn, flash_attn_interface, flashinfer.decode
three = flash_attn_interface.flash_attn_with_kvcache
decode = flashinfer.decode.trtllm_batch_decode_with_kv_cache
rule = {"softmax_scale": 1.0, "causal": True}
calls = {
    "float32": lambda: three(
        q[:, None].float(), *kv.float(), cache_seqlens=lens, page_table=table, **rule),
    "int64": lambda: three(q[:, None], *kv, cache_seqlens=lens.long(), page_table=table, **rule),
    "page": lambda: flash_attn.flash_attn_with_kvcache(
        q[:, None], *kv, cache_seqlens=lens, block_table=table, **rule),
    "layout": lambda: decode(q, tuple(kv), workspace, table, lens, 32, 1.0),
    "dirty": lambda: decode(q, tuple(kv), workspace + 1, table, lens, 32, 1.0, kv_layout="NHD"),
    "name": lambda: three(q[:, None], *kv, block_table=table),
}
found["refused"] = {}
for name, call in calls.items():
    try:
        call()
    except TypeError as error:
        found["refused"][name] = str(error)
sys.path.pop(0)
for name in ("flash_attn_interface", "flash_attn", "flashinfer"):
    sys.modules.pop(name)
found["missing"] = {}
for name, arch in job["missing"]:
    try:
        opened(name, arch)
    except ConfigError as error:
        found["missing"][f"{name} {arch}"] = [str(error), str(error.mend)]
simdevice.report(found)
"""
TRIED = [
    ("flash", "sm_90", CASES), ("flash", "sm_80", [*CASES, {"works": LONG}]),
    ("flashinfer", "sm_90", CASES),
]  # fmt: skip
LEFT = {"flash sm_90": [7], "flash sm_80": [7], "flashinfer sm_90": [0, 2, 4, 5, 6, 7]}
"""Cases that the library does not have: the own op does them."""
MISSING = [("flash", "sm_90"), ("flashinfer", "sm_90"), ("flashinfer", "sm_80"), ("aiter", "sm_90")]


@pytest.fixture(scope="module")
def found(h200):
    """What one process on the device found."""
    job = {"tried": TRIED, "heads": HEADS, "missing": MISSING}
    return on_device(h200, TRY + REFUSALS, job)


@pytest.mark.parametrize(("name", "arch", "cases"), TRIED, ids=list(LEFT))
def test_a_library_gives_the_dense_answer_or_leaves_it_to_the_own_op(found, name, arch, cases):
    rows = found[f"{name} {arch}"]
    assert [wrong for wrong, _ in rows] == [None] * len(cases)
    # old tokens are written first, as a prefill: a decode of the library's is seen by its own count
    for i, (case, (_, calls)) in enumerate(zip(cases, rows, strict=True)):
        phase = "decode" if all(new == 1 for _, new in case["works"]) else "varlen"
        assert (calls.get(phase, 0) > 0) == (i not in LEFT[f"{name} {arch}"]), (case, calls)


def test_pages_are_the_library_s(found):
    assert found["pages"] == {"sm_80": [256], "sm_90": [16, 32, 64]}


def test_the_stand_ins_refuse_what_the_libraries_refuse(found):
    refused = dict(found["refused"])
    assert refused.pop("float32").endswith("float32")
    assert "cache_seqlens is torch.int64" in refused.pop("int64")
    assert "divisible by 256" in refused.pop("page")
    assert "HND with pages" in refused.pop("layout")
    assert "not 0 at first use" in refused.pop("dirty")
    assert "unexpected keyword argument 'block_table'" in refused.pop("name")
    assert not refused


def test_what_is_not_there_is_said_with_the_mend(found):
    missing = found["missing"]
    assert missing.keys() == {f"{name} {arch}" for name, arch in MISSING}
    assert "pip install flash-attn" in missing["flash sm_90"][1]
    assert "pip install flashinfer" in missing["flashinfer sm_90"][1]
    assert "this is sm_80" in missing["flashinfer sm_80"][0]
    assert "the cuda backend has auto, flash, flashinfer" in missing["aiter sm_90"][0]


def test_devices_names_the_libraries_that_are_installed(h200):
    command = [sys.executable, "-m", "tokenry", "devices"]
    for path, end in ((str(STANDINS), ", attention can be flash or flashinfer)"), ("", ".86.15)")):
        env = os.environ | h200 | {"PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        line = next(line for line in done.stdout.splitlines() if line.split()[:1] == ["cuda"])
        assert line.rstrip().endswith(end)


SERVE = """
from tokenry import LLM, SamplingParams

device, found = simdevice.current(), {}
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
prompts = [{"prompt_token_ids": [(7 * i * i + 3 * i + 1) % 256 for i in range(n)]}
           for n in (11, 1)]
limits = dict(dtype="float16", max_model_len=48, max_num_seqs=2, num_kv_blocks=12,
              max_num_batched_tokens=8)
for name in ("auto", "flash"):
    device.relax()
    with LLM("demo", backend="cuda", backend_option=("kernels=torch", f"attention={name}"),
             **limits) as llm:
        standin_paged.CALLS.clear()
        device.strict()
        device.reset_counts()
        done = llm.generate(prompts, greedy, use_tqdm=False)
        counts = device.counts()
        found[name] = dict(tokens=[c.outputs[0].token_ids for c in done], syncs=counts.host_syncs,
                           replays=counts.replays, calls=dict(standin_paged.CALLS),
                           fallbacks=llm.get_metrics().op_fallbacks)
simdevice.report(found)
"""


@pytest.mark.slow
def test_a_model_is_served_from_captured_steps_with_a_library_s_attention(h200):
    found = on_device(h200, SERVE, {})
    assert found["flash"]["tokens"] == found["auto"]["tokens"]
    assert found["flash"]["calls"] == {}, "a step ran outside its program"
    assert found["flash"]["replays"] == found["auto"]["replays"] > 0
    assert found["flash"]["syncs"] == 0
    assert found["flash"]["fallbacks"] == {}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"attention": "xformers"}, "one of auto, flash, flashinfer, aiter"),
        ({"attention": "flash", "deterministic": "true"}, "others choose their sums"),
        ({"tune": "true", "deterministic": "true"}, "with the table's tiles"),
        ({"tune": "true", "kernels": "torch"}, "has no tiles"),
        ({"tune": "maybe"}, "one of false, true"),
    ],
)
def test_options_that_cannot_be_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        GpuOptions.parse("cuda", options)


TUNE = """
sys.path.insert(0, job["lane"])
import triton_interpreter
triton_interpreter.install()
from tokenry.backend.contract import KVSpec
from tokenry_triton.gpu import choice

choice.milliseconds = lambda call: call() or 1.0  # events here have no time
backend = opened("auto", kernels="triton", tune="true")
linear = backend.ops()["linear"]
packed = linear.quantize({"weight": torch.ones(32, 64, device="cuda")}, "int8")
x = torch.ones(2, 64, device="cuda")
linear(x, packed)
before = backend._tuner.measured
spec = KVSpec(num_layers=1, num_kv_heads=1, head_dim=16, block_size=16, dtype="float32")
backend.plan_kv(spec, 1 << 30, lambda: linear(x, packed))
after = backend._tuner.measured
linear(torch.ones(40, 64, device="cuda"), packed)  # a shape that no warm-up had
simdevice.report([before, after, backend._tuner.measured, str(backend._tuner.path),
                  sorted(json.loads(backend._tuner.path.read_text()))])
"""


def test_tiles_are_measured_in_the_step_before_the_plan_and_never_in_service(h200, tmp_path):
    lane = Path(__file__).parents[2] / "triton/tests/lane"
    env = {"TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path)}
    before, after, end, path, keys = on_device(h200, TUNE, {"lane": str(lane)}, env)
    assert (before, after, end) == (0, 1, 1)
    assert path.startswith(f"{tmp_path}/tokenry/tiles/sm_90-3.")
    assert keys == ["linear int8 16x32x64 torch.float32"]
