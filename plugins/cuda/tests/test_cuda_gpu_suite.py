"""tests/gpu, which is for real GPUs, on the simulated one: so that it is sound when a GPU comes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from simdevice import environment

PROMOTE = {"SIMDEVICE_DTYPES": "promote"}  # as torch does in its plain attention in bfloat16
SUITE = Path(__file__).parents[3] / "tests/gpu"


@pytest.mark.slow
def test_the_suite_for_real_gpus_passes_on_the_simulated_one(h200):
    env = environment("cuda", env={**h200, "GPU_TEST_OPTIONS": "kernels=torch"} | PROMOTE)
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(SUITE)]
    command += ["-k", "not none"]  # test_cuda_end_to_end.py has these
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    # all of them ran, but the one that a real GPU alone is asked for
    assert done.stdout.count("SKIPPED") == 1, done.stdout
    assert "the conformance kit does it there" in done.stdout
