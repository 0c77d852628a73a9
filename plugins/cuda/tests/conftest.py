"""A stand-in for the driver's management library, built from nvml_stub.c."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def nvml_folder(tmp_path_factory):
    """A folder for LD_LIBRARY_PATH with a libnvidia-ml.so.1 that answers from the environment."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    folder: Path = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("nvml_stub.c")
    target = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return folder


@pytest.fixture(scope="session")
def h200(nvml_folder):
    """The environment of a machine with one H200."""
    return {
        "LD_LIBRARY_PATH": str(nvml_folder),
        "STUB_CARDS": "NVIDIA H200|GPU-4f2a|90|0",
    }
