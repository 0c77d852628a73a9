"""Libraries for what the CUDA build of torch links to, so that it loads where no CUDA is.

    python tests/xla/stubs.py SITE_PACKAGES/torch/lib

torch_xla loads in one version of torch only, and of that version there is a CUDA build alone. Each
library written here has the functions that torch's own ask for; all return 100
(cudaErrorNoDevice), so torch finds no device and computes on the CPU. Needs binutils and a C
compiler.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

OWN = ("libtorch", "libc10", "libshm", "libcaffe2")
VENDOR = re.compile(r"NEEDED.*\[((?:libcu|libnccl|libnv|libcupti)[^\]]*)\]")
UNVERSIONED = re.compile(r"(nccl|cu[A-Z]|cuda[A-Z]|cudnn|cublas|cu[a-z]+|nv[a-z]+)")
DRIVER = "libcuda.so.1"
"""Loaded by name at run time, never linked."""
CALLS_ITSELF = "libnccl.so.2"
"""The one whose functions have no version in the symbol table."""


def told(*command: str | Path) -> str:
    """What a program prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def wanted(lib: Path) -> dict[str, dict[str, set[str]]]:
    """Library -> version -> functions that torch's libraries in `lib` need of it."""
    libraries: set[str] = set()
    home: dict[str, str] = {}  # version -> the library that has it
    undefined: set[str] = set()
    defined: set[str] = set()
    for path in (p for p in lib.glob("*.so*") if p.name.startswith(OWN)):
        libraries |= set(VENDOR.findall(told("readelf", "-dW", path)))
        current = ""
        for line in told("objdump", "-p", path).splitlines():
            if found := re.match(r"\s+required from (\S+):", line):
                current = found[1]
            elif current and (found := re.match(r"\s+0x\S+ 0x\S+ \d+ (\S+)", line)):
                home[found[1]] = current
            elif not line.strip():
                current = ""
        for line in told("nm", "-D", path).splitlines():
            *_, kind, symbol = line.split()
            (undefined if kind in "Uw" else defined).add(symbol)
    libraries.discard(DRIVER)
    needed: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in libraries}
    for version, library in home.items():
        if library in needed:
            needed[library][version] = set()
    for symbol in undefined - defined:
        name, _, version = symbol.partition("@")
        library = home.get(version.lstrip("@"), "")
        if library in needed:
            needed[library][version.lstrip("@")].add(name)
        elif not version and CALLS_ITSELF in needed and UNVERSIONED.match(name):
            needed[CALLS_ITSELF][""].add(name)
    return needed


def write(lib: Path, library: str, versions: dict[str, set[str]]) -> None:
    """Compile one library into `lib`."""
    code, script = [], []
    for version, names in versions.items():
        for name in sorted(names):
            text = re.search(r"ErrorString|ErrorName|GetStatusString", name)
            kind, value = ("const char *", '"no device"') if text else ("long ", "100")
            code.append(f"{kind}{name}(void) {{ return {value}; }}")
        if version:
            listed = " ".join(f"{name};" for name in sorted(names))
            script.append(f"{version} {{ {f'global: {listed}' if names else ''} }};")
    with tempfile.TemporaryDirectory() as folder:
        source, map_ = Path(folder) / "stub.c", Path(folder) / "stub.map"
        source.write_text("\n".join(code) + "\n")
        map_.write_text("\n".join(script) + "\n")
        flags = ["-w", "-shared", "-fPIC", "-nostdlib", "-fno-builtin", f"-Wl,-soname,{library}"]
        flags += [f"-Wl,--version-script={map_}"] if script else []
        told("cc", *flags, source, "-o", lib / library)


def main(lib: Path) -> None:
    """All libraries."""
    for library, versions in sorted(wanted(lib).items()):
        write(lib, library, versions)
        print(f"{library}: {sum(map(len, versions.values()))} functions")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
