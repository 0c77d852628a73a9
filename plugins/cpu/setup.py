"""Builds the native kernels: one library for every Python and torch, called through ctypes.

Each instruction set is a source file with flags of its own; which one runs is chosen when the
library is loaded. Without a C++ compiler the package installs without them and says so at run time.
"""

from __future__ import annotations

import hashlib
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

COMMON = [
    "-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall",
    "-Wextra", "-Wno-maybe-uninitialized", "-Wno-psabi",
]  # fmt: skip
SANITIZE = bool(os.environ.get("TOKENRY_CPU_SANITIZE"))  # `make sanitize`
if SANITIZE:
    COMMON += ["-fsanitize=address", "-g1", "-O1"]
    # checks as calls: written out in the unrolled tiles they take the compiler three times as long
    COMMON += ["--param", "asan-instrumentation-with-call-threshold=0"]
# Not for the vector files: their unrolled tiles would take the compiler many minutes.
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"] if SANITIZE else []
LINK = ["-pthread", *(["-fsanitize=address,undefined"] if SANITIZE else [])]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
SOURCES: dict[str, list[str]] = {
    f"csrc/{name}.cpp": UNDEFINED for name in ("api", "pool", "program", "sample", "isa_plain")
}
SOURCES["csrc/pack.cpp"] = [*UNDEFINED, "-ffp-contract=off"]  # the same scales on every machine
if platform.machine().lower() in {"x86_64", "amd64"}:
    SOURCES |= {
        "csrc/isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
        "csrc/isa_avx512.cpp": AVX512,
        "csrc/isa_avx512_vnni.cpp": [*AVX512, "-mavx512vnni"],
        "csrc/isa_avx512_bf16.cpp": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
        "csrc/amx.cpp": UNDEFINED,
        "csrc/isa_amx.cpp": [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
        "csrc/isa_amx_standin.cpp": [*UNDEFINED, "-mavx2", "-mfma", "-mf16c"],
    }


OBJECTS = Path("build") / "objects"


class Native(build_ext):
    """A plain shared library under a name without a Python tag."""

    def get_ext_filename(self, fullname: str) -> str:
        """The name in the package: tokenry_cpu/_native.so."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compiles the sources side by side, then links."""
        headers = max(Path(name).stat().st_mtime for name in [__file__, *ext.depends])

        def build(item: tuple[str, list[str]]) -> list[str]:
            source, flags = item
            flags = [*COMMON, *flags]
            # an object that was made with these flags from what is there now is good, for an
            # editable installation and a wheel alike
            made_for = repr([platform.machine(), *flags]).encode()
            place = str(OBJECTS / hashlib.sha256(made_for).hexdigest()[:8])
            objects: list[str] = self.compiler.object_filenames([source], output_dir=place)
            newest = max(headers, Path(source).stat().st_mtime)
            if all(Path(o).exists() and Path(o).stat().st_mtime > newest for o in objects):
                return objects
            objects = self.compiler.compile([source], output_dir=place, extra_postargs=flags)
            return objects

        with ThreadPoolExecutor(4) as workers:
            objects = [name for names in workers.map(build, SOURCES.items()) for name in names]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=LINK,
            target_lang="c++",
        )


class AnyPython(bdist_wheel):
    """The library knows nothing of Python: the wheel is for the platform only."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "tokenry_cpu._native",
            list(SOURCES),
            depends=[str(p) for p in Path("csrc").glob("*") if p.suffix in {".h", ".inl"}],
            optional=True,
        )
    ],
    cmdclass={"build_ext": Native, "bdist_wheel": AnyPython},
)
