"""Compiles what the ops launch, for devices that are not here, and reads what the compiler made.

`recorded(call)` runs ops on meta tensors of a real model's shapes and notes each launch: kernel,
argument types, constants, warps, stages. `built(launch, target)` compiles one of them ahead of time
and gives registers, spills, shared memory and the count of matrix instructions. A device refuses a
kernel with too much shared memory only when it loads it, and a spill is refused by nobody: so both
are figures in budgets.json, which the tests compare.

python triton_aot.py cuda:90 hip:gfx942   prints JSON {target: {launch: figures}}. Must not run
under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.compiler import ASTSource
from triton.compiler import compile as build
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
    torch.int64: "*i64", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e4m3fnuz: "*fp8e4b8",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]
OPTIONS = ("num_warps", "num_stages", "num_ctas", "waves_per_eu", "matrix_instr_nonkdim", "kpack")
MATRIX = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma|v_wmma")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel as it was launched."""

    kernel: JITFunction
    signature: dict
    constants: dict
    aligned: tuple
    options: dict


def recorded(call):
    """What `call()` launches, without running it."""
    launches = []
    run = JITFunction.run

    def note(self, *args, grid, warmup, **kwargs):
        launches.append(_launch(self, args, kwargs))

    JITFunction.run = note
    try:
        call()
    finally:
        JITFunction.run = run
    return launches


def _launch(kernel, args, kwargs):
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, aligned = {}, {}, []
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        one = special and isinstance(value, int) and value == 1  # Triton makes a constant of it
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned.append((i,))
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                aligned.append((i,))
        else:
            signature[parameter.name] = "fp32"
    return Launch(
        kernel=kernel, signature=signature, constants=constants, aligned=tuple(aligned),
        options=options,
    )  # fmt: skip


def target_of(name):
    """cuda:90 or hip:gfx942."""
    backend, arch = name.split(":")
    return GPUTarget("cuda", int(arch), 32) if backend == "cuda" else GPUTarget("hip", arch, 64)


def built(launch, target):
    """Figures of a launch compiled for a target."""
    source = ASTSource(
        fn=launch.kernel, signature=launch.signature, constexprs=launch.constants,
        attrs=dict.fromkeys(launch.aligned, ALIGNED),
    )  # fmt: skip
    compiled = build(source, target=target, options=launch.options)
    figures = {"shared": compiled.metadata.shared}
    if target.backend == "cuda":
        registers, stack = map(int, RESOURCES.search(_resources(compiled.asm["cubin"])).groups())
        text = compiled.asm["ptx"]
        figures |= {"registers": registers, "spilled": stack}
    else:
        text = compiled.asm["amdgcn"]
        figures |= {
            "registers": _figure(text, "vgpr_count"),
            "spilled": _figure(text, "vgpr_spill_count"),  # scalars go to lanes of a register
        }
    return figures | {"matrix": len(MATRIX.findall(text))}


def _resources(cubin):
    tool = Path(nvidia).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _figure(text, name):
    return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])


def main(targets):
    """JSON of all launches for the targets."""
    from triton_scenes import scenes

    result = {}
    for name in targets:
        target = target_of(name)
        figures = result[name] = {}
        for scene, call in scenes(target).items():
            for launch in recorded(call):
                key = f"{scene}: {launch.kernel.fn.__name__}"
                figures[key] = built(launch, target)
                print(name, key, figures[key], file=sys.stderr)
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    triton.knobs.cache.dir = tempfile.mkdtemp()
    main(sys.argv[1:])
