"""AITER before the own attention, on the simulated device, with a stand-in that takes and refuses
what the real function does. The real library has never been run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from simdevice import run_on_device

from tokenry.errors import ConfigError
from tokenry_rocm import providers

FOLDERS = [Path(__file__).parent / "standins", Path(__file__).parents[2] / "cuda/tests/standins"]
SCRIPT = """
import sys
sys.path[:0] = sys.argv[1:3]
from functools import partial
import simdevice
import torch
import standin_paged
from tokenry.backend.reference import REFERENCE_OPS
from tokenry.conformance.attention import trial
from tokenry.conformance.paged import AttentionCase, Paged
from tokenry_rocm.providers import PROVIDERS
from tokenry_triton.gpu.backend import GpuBackend
from tokenry_triton.gpu.choice import Gpu
from tokenry_triton.gpu.options import GpuOptions

gpu = Gpu(backend="rocm", index=0, arch="gfx942", dtypes=("bfloat16", "float16", "float32"),
          fp8="e4m3fnuz", attention=PROVIDERS)
backend = GpuBackend(gpu, GpuOptions.parse("rocm", {"kernels": "torch", "attention": "aiter"}))
mixed, decode = ((0, 17), (16, 1), (15, 3), (3, 21)), ((15, 1), (53, 1))
heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "bfloat16"}
found = []
for rule in ({}, {"window": 5}, {"softcap": 2.0}, {"dtype": "float16"}, {"dtype": "float32"}):
    for works in (mixed, decode):
        standin_paged.CALLS.clear()
        wrong = trial(backend, AttentionCase(works=works, spare=True, **heads | rule))
        found.append([wrong, rule.get("dtype"), dict(standin_paged.CALLS)])

def with_sinks(op):
    paged = Paged(backend, AttentionCase(works=mixed, **heads))
    sinks = torch.tensor([2.5, -1.0, 0.0, 7.0], dtype=torch.bfloat16, device="cuda")
    paged.op = partial(op, sinks=sinks)
    return paged.run().got[0]

error = abs(with_sinks(backend.ops()["attention"]) - with_sinks(REFERENCE_OPS["attention"])).max()
simdevice.report({"tried": found, "sinks": float(error)})
"""


def test_aiter_gives_the_dense_answer_or_leaves_it_to_the_own_kernels():
    env = {"SIMDEVICE_GPU": "MI300X", "SIMDEVICE_DTYPES": "promote"}
    found = run_on_device("cuda", SCRIPT, args=list(map(str, FOLDERS)), env=env).value
    assert found["sinks"] < 0.02
    assert len(found["tried"]) == 10
    for wrong, dtype, calls in found["tried"]:
        assert wrong is None
        assert bool(calls) == (dtype != "float32")


def test_what_is_not_there_is_said_with_the_mend():
    for arch, text in (("gfx90a", "this is gfx90a"), ("gfx942", "aiter is not installed")):
        with pytest.raises(ConfigError, match=text) as caught:
            providers.aiter(arch, None, None)
        assert "leave attention out" in str(caught.value.mend)
