"""The plugin as a wheel: in a clean environment its own tests pass, in any Python it loads."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

wheelhouse = pytest.importorskip("wheelhouse", reason="not in the repository")
CPU, DEMO, ROOT = wheelhouse.CPU, wheelhouse.DEMO, wheelhouse.ROOT
pip, run = wheelhouse.pip, wheelhouse.run

pytestmark = pytest.mark.slow
OWN_TESTS = ("test_cpu_ops.py", "test_cpu_program.py", "test_cpu_sample.py")
WITHOUT_TORCH = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
lib.tk_isas.restype = ctypes.c_char_p
lib.tk_pack.restype = p = ctypes.c_void_p
i = ctypes.c_int64
lib.tk_pack.argtypes = (p, p, i, i, ctypes.c_int32)
lib.tk_linear.argtypes = (p, p, i, i, p, i)
weight = (ctypes.c_float * 12)(*range(12))  # [3, 4]
x, y = (ctypes.c_float * 8)(1, 0, 0, 0, 0, 0, 0, 2), (ctypes.c_float * 6)()
packed = lib.tk_pack(weight, None, 3, 4, 0)
lib.tk_linear(packed, x, 4, 2, y, 3)
assert list(y) == [0, 4, 8, 6, 14, 22], list(y)
print(sys.version_info[:2], lib.tk_isas().decode())
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Wheels of the core, the demo model and this plugin."""
    return wheelhouse.wheels(tmp_path_factory, ROOT, DEMO, CPU)


@pytest.fixture(scope="module")
def clean(tmp_path_factory, wheels):
    """Python of a venv with the wheels, and links to what they require."""
    home = tmp_path_factory.mktemp("home")
    venv.create(home / "venv", with_pip=True)
    python = home / "venv" / "bin" / "python"
    links = wheelhouse.link_dependencies(home / "dependencies")
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    (site / "dependencies.pth").write_text(f"{links}\n")
    pip("uninstall", "-q", "-y", "setuptools", python=python)  # an old one, before the linked
    target = ("-q", "--no-index", "-f", wheels)
    pip("install", *target, "tokenry[demo]", "tokenry-cpu", python=python)
    return python


def test_the_wheel_is_for_every_python_and_holds_the_library(wheels):
    (wheel,) = wheels.glob("tokenry_cpu-*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"tokenry_cpu/_native.so", "tokenry_cpu/backend.py"} <= set(names)
    assert not [n for n in names if n.endswith((".cpp", ".inl", ".h", ".o"))]
    assert wheel.stat().st_size < 8 * 2**20


def test_its_own_tests_pass_in_a_clean_environment(clean, tmp_path):
    for name in OWN_TESTS:
        shutil.copy(CPU / "tests" / name, tmp_path)
    own = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TOKENRY_")} | own
    where = run(clean, "-c", "import tokenry_cpu; print(tokenry_cpu.__file__)", env=environment)
    assert str(clean.parent.parent) in where
    said = run(
        clean, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", tmp_path,
        env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert re.search(r"\d\d+ passed", said) and "failed" not in said
    assert importlib.metadata.version("tokenry-cpu") in pip("list", python=clean)


@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_the_library_works_in_another_python_without_torch(wheels, tmp_path, version):
    python = shutil.which(f"python{version}")
    tried = python and subprocess.run([python, "-c", ""], capture_output=True, check=False)
    if not tried or tried.returncode:
        pytest.skip(f"there is no Python {version} here")
    (wheel,) = wheels.glob("tokenry_cpu-*.whl")
    library = zipfile.ZipFile(wheel).extract("tokenry_cpu/_native.so", tmp_path)
    said = run(python, "-c", WITHOUT_TORCH, library)
    assert version.replace(".", ", ") in said and "plain" in said
