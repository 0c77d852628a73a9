"""tests/gpu_kernels, which is for real GPUs, interpreted on the simulated one: so that it is sound
when a GPU comes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from simdevice import environment

SUITE = Path(__file__).parents[3] / "tests/gpu_kernels"


@pytest.mark.slow
def test_the_kernels_suite_passes_interpreted(h200):
    more = {"SIMDEVICE_DTYPES": "promote", "GPU_KERNELS": "interpreted"}
    env = environment("cuda", env={**h200, **more})
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(SUITE)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    # but for those of libraries that are not installed
    assert done.stdout.count("SKIPPED") == 3, done.stdout
    assert done.stdout.count("attention=") == 3
    assert done.stdout.startswith("."), done.stdout
