"""The library built for Arm, run by an emulator: what it computes beside this machine's own build.

Needs a cross compiler and qemu's user mode (Debian: g++-aarch64-linux-gnu, qemu-user).
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tokenry_cpu import native

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc"
EVERYWHERE = ("api", "pool", "program", "sample", "isa_plain", "pack")
"""The sources that setup.py compiles on every machine."""
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LINES = 2 * (3 * 4 + 4)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SOURCES.is_dir(), reason="the sources are not beside the tests"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64"),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"no {COMPILER} or no {EMULATOR}",
    ),
]


def said(program: Path, *build: str, runner: Sequence[str] = ()) -> list[tuple[str, np.ndarray]]:
    """The lines of other_machine.cpp, made into `program` by this command."""
    common = ["-std=c++17", f"-I{SOURCES}", "-pthread", str(HERE / "other_machine.cpp")]
    subprocess.run([*build[:1], *common, *build[1:], "-o", str(program)], check=True)
    command = [*runner, str(program)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    lines = [line.split() for line in done.stdout.splitlines()]
    return [(name, np.array(values, np.float32)) for name, *values in lines]


def test_a_build_for_arm_computes_what_this_machines_does(tmp_path):
    sources = [str(SOURCES / f"{name}.cpp") for name in EVERYWHERE]
    flags = ("-O2", "-w", "-fno-math-errno", "-fno-trapping-math", "-static")
    arm = said(tmp_path / "arm", COMPILER, *flags, *sources, runner=[EMULATOR])
    library = str(native.LIBRARY)
    here = said(tmp_path / "here", "g++", library, f"-Wl,-rpath,{native.LIBRARY.parent}")
    assert len(arm) == len(here) == LINES
    for (name, got), (same, want) in zip(arm, here, strict=True):
        assert name == same and got.size == want.size > 0
        assert np.isfinite(want).all() and np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5, err_msg=name)
    half = LINES // 2
    for (name, one), (_, two) in zip(arm[:half], arm[half:], strict=True):
        assert np.array_equal(one, two), f"{name}: threads change the bits"
