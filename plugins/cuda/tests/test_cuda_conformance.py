"""The conformance kit: on an NVIDIA GPU where there is one, and on the simulated device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from simdevice import environment

from tokenry.conformance import conformance_tests

test_an_nvidia_gpu_conforms = conformance_tests("cuda")

ASKED = 36
"""Checks that these Caps are asked for: all 40 but kv_baked and the three of batch_invariant."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graphs", "only"), [("capture", []), ("none", ["C01", "C05", "C15", "C17"])]
)
def test_the_plugin_conforms_on_the_simulated_device(tmp_path, h200, graphs, only):
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tokenry", "conform", "cuda", "--steps", "12"]
    command += ["--backend-option", "kernels=torch", "--json", str(report)]
    command += ["--backend-option", f"graphs={graphs}"]
    command += ["--only", *only] if only else []
    # promote: torch's plain attention in bfloat16 adds a bfloat16 mask to float32 scores
    env = environment("cuda", env={**h200, "SIMDEVICE_DTYPES": "promote"})
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert report.exists(), done.stderr[-2000:]
    results = json.loads(report.read_text())["results"]
    assert [r for r in results if r["status"] in ("failed", "weak")] == []
    assert sum(r["status"] == "passed" for r in results) >= (len(only) or ASKED)
    assert done.returncode == 0
