"""The device's library: built once with the C++ compiler at hand, kept by torch version and source.

In: the sources beside this file and the installed torch. Out: the path of a shared library. Imports
no torch, so a parent process can build before it starts the one that uses it. Knows nothing of
devices.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-shared")


class BuildFailed(RuntimeError):
    """The device's library could not be built."""


def build_folder() -> Path:
    """Where libraries are kept: $SIMDEVICE_BUILD_DIR, or build/simdevice in the checkout."""
    given = os.environ.get("SIMDEVICE_BUILD_DIR")
    return Path(given) if given else Path(__file__).parents[3] / "build" / "simdevice"


def library() -> Path:
    """The library for the installed torch, built if it is not there; one builder at a time."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildFailed("torch is not installed here; mend: pip install torch")
    torch_root = Path(spec.submodule_search_locations[0])
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    version = importlib.metadata.version("torch")
    path = build_folder() / f"libsimdevice-torch{version}-{digest.hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(torch_root, path)
    return path


def _compile(torch_root: Path, path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise BuildFailed("no C++ compiler (g++, c++ or $CXX); mend: install g++")
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    include, lib = torch_root / "include", torch_root / "lib"
    api = include / "torch" / "csrc" / "api" / "include"
    command = [compiler, *FLAGS, f"-I{include}", f"-I{api}", str(SOURCES / "all.cpp")]
    command += ["-o", str(partial), f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildFailed(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    partial.rename(path)
