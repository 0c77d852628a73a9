"""AMX's kernels where there is no AMX: the instructions' stand-in against their definition, the
kernels on it against those of other instruction sets, and the code as compiled for AMX against it,
its tile instructions trapped and carried out one by one (`amx_trap.cpp`).
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import struct
import subprocess
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from fractions import Fraction
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from tokenry import LLM, SamplingParams
from tokenry_cpu import native

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
STANDIN = "amx_standin"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
SOURCES = {  # flags as in setup.py
    HERE / "amx_trap.cpp": ["-mavx2", "-mfma", "-O1"],
    CSRC / "isa_amx.cpp": [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16", "-O3"],
    CSRC / "isa_amx_standin.cpp": ["-mavx2", "-mfma", "-mf16c", "-O1"],
    CSRC / "isa_plain.cpp": ["-O1"],
    CSRC / "amx.cpp": ["-O1"],
}
pytestmark = pytest.mark.skipif(
    STANDIN not in native.standins(), reason=f"no stand-in on {platform.machine()}"
)
some = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
shapes = {
    "rows": st.integers(1, 97),
    "n": st.integers(1, 70),
    "k": st.one_of(st.integers(1, 200), st.sampled_from([512, 513, 1024, 1100])),
    "format": st.sampled_from(["int8", "bfloat16_dots"]),
}


@pytest.fixture(autouse=True)
def isa():
    """The kernels' instruction set is the caller's again afterwards."""
    before = native.isa()
    yield
    native.set_isa(before)


@pytest.fixture(scope="module")
def trap(tmp_path_factory):
    """`amx_trap.cpp` and the kernels, compiled."""
    compiler = shutil.which("c++")
    if compiler is None or "avx512" not in native.isas():
        pytest.skip("needs a C++ compiler and AVX-512")
    place = tmp_path_factory.mktemp("amx")
    common = [compiler, "-std=c++17", "-fPIC", "-fvisibility-inlines-hidden", "-Wno-psabi", "-w"]
    common += ["-fno-math-errno", "-fno-trapping-math"]
    objects = [place / f"{source.stem}.o" for source in SOURCES]
    for (source, flags), made in zip(SOURCES.items(), objects, strict=True):
        subprocess.run([*common, *flags, f"-I{CSRC}", "-c", source, "-o", made], check=True)
    library = place / "trap.so"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    lib = ctypes.CDLL(str(library))
    lib.run.restype = c_int64
    lib.run.argtypes = (c_void_p, c_void_p, c_int64, c_void_p, c_int32)
    lib.tile_fault.restype = c_char_p
    for name in ("tile_load", "tile_store"):
        getattr(lib, name).argtypes = (c_int32, c_void_p, c_int64)
    return lib


def product(n, k, format, seed=0):
    """A packed weight, what it holds in float64, its bias."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((n, k), generator=generator)
    bias = torch.randn(n, generator=generator)
    if format == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return native.Weight(weight, bias, format), torch.round(weight / scale) * scale, bias
    weight = weight.bfloat16()
    return native.Weight(weight, bias, format), weight.float(), bias


@example(rows=97, n=70, k=1100, format="bfloat16_dots")
@example(rows=33, n=64, k=1056, format="int8")
@given(**shapes)
@some
def test_the_code_as_compiled_does_what_it_does_on_the_stand_in(trap, rows, n, k, format):
    packed, _, _ = product(n, k, format)
    x = torch.randn((rows, k))
    guard = 7
    results = []
    for standin in (0, 1):
        y = torch.full((rows * n + 2 * guard,), 12345.0)
        trapped = trap.run(packed.handle, x.data_ptr(), rows, y[guard:].data_ptr(), standin)
        assert trap.tile_fault() is None
        assert (trapped > 0) == (not standin and not trap.has_amx())
        assert (y[:guard] == 12345.0).all()
        assert (y[-guard:] == 12345.0).all()
        results.append(y)
    assert results[0].isfinite().all()
    assert torch.equal(*results)


@example(rows=97, n=70, k=1100, format="bfloat16_dots")
@given(**shapes)
@some
def test_products_are_those_of_other_instruction_sets(rows, n, k, format):
    packed, weight, bias = product(n, k, format)
    x = torch.randn((rows, k))
    native.set_isa(STANDIN)
    y = packed(x)
    if format == "int8":  # whole numbers have one sum
        for name in {"avx512_bf16", "avx512_vnni"} & set(native.isas()):
            native.set_isa(name)
            assert torch.equal(packed(x), y)
    else:
        exact = x.bfloat16().double() @ weight.double().T + bias.double()
        assert (y - exact).norm() / exact.norm() < 1e-6


@given(**shapes, data=st.data())
@some
def test_a_row_has_the_same_bits_in_any_company(rows, n, k, format, data):
    packed, _, _ = product(n, k, format)
    native.set_isa(STANDIN)
    x = torch.randn((97, k))
    full = packed(x)
    first = data.draw(st.integers(0, 97 - rows))
    broken = x.clone()
    broken[: max(first, 1) - 1] = float("nan")
    assert torch.equal(packed(x[first : first + rows]), full[first : first + rows])
    assert torch.equal(packed(broken)[first:], full[first:])


def configuration(tiles, *, palette=1, reserved=None):
    """LDTILECFG's 64 bytes. tiles: by number, rows and their bytes; reserved: a byte set to 1."""
    memory = bytearray(64)
    memory[0] = palette
    for number, (rows, width) in tiles.items():
        struct.pack_into("<H", memory, 16 + 2 * number, width)
        memory[48 + number] = rows
    if reserved is not None:
        memory[reserved] = 1
    return bytes(memory)


FITTING = {0: (16, 64), 1: (16, 64), 2: (16, 64), 3: (5, 8), 4: (5, 12), 5: (3, 8)}


@pytest.mark.parametrize(
    ("tiles", "options"),
    [
        ({0: (17, 64)}, {}),
        ({0: (16, 68)}, {}),
        ({0: (0, 64)}, {}),
        ({0: (16, 0)}, {}),
        (FITTING, {"palette": 2}),
        (FITTING, {"reserved": 2}),
        (FITTING, {"reserved": 32}),
        (FITTING, {"reserved": 63}),
        ({8: (16, 64)}, {}),
    ],
    ids=str,
)
def test_a_configuration_that_faults_is_refused(trap, tiles, options):
    trap.tile_configure(configuration(tiles, **options))
    assert b"#GP" in trap.tile_fault()


@pytest.mark.parametrize(
    ("c", "a", "b"),
    [(0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 1, 6), (0, 1, 3), (0, 4, 2), (3, 4, 2), (3, 1, 5)],
)
def test_a_product_that_faults_is_refused(trap, c, a, b):
    for dot in (trap.tile_dot_int8, trap.tile_dot_bf16):
        trap.tile_configure(configuration(FITTING))
        dot(3, 4, 5)
        dot(0, 1, 2)
        assert trap.tile_fault() is None
        dot(c, a, b)
        assert b"#UD" in trap.tile_fault()
        trap.tile_release()
        dot(0, 1, 2)
        assert b"#UD" in trap.tile_fault()


def test_a_tile_that_is_not_there_is_neither_loaded_nor_stored(trap):
    memory = (ctypes.c_char * 1024)()
    trap.tile_configure(configuration(FITTING | {6: (4, 6)}))
    for number in (6, 7):  # six bytes a row are no whole elements
        trap.tile_load(number, memory, 64)
        assert b"TILELOADD" in trap.tile_fault()
        trap.tile_store(number, memory, 64)
        assert b"TILESTORED" in trap.tile_fault()
    trap.tile_configure(bytes(64))  # palette 0: none is there
    trap.tile_zero(0)
    assert b"TILEZERO" in trap.tile_fault()


def multiplied(trap, dot, c, a, b):
    """c + a b by one instruction: c [rows, columns] of 4 bytes, a [rows, 4k], b [k, 4 columns]
    bytes; tile 1, 2 and 3.
    """
    tiles = {1: (len(c), len(c[0])), 2: (len(a), len(a[0])), 3: (len(b), len(b[0]))}
    trap.tile_configure(configuration(tiles))
    for number, rows in ((1, c), (2, a), (3, b)):
        trap.tile_load(number, b"".join(rows), len(rows[0]))
    dot(1, 2, 3)
    out = (ctypes.c_char * (len(c) * 100))(*b"\xee" * (len(c) * 100))
    trap.tile_store(1, out, 100)
    assert trap.tile_fault() is None
    width = len(c[0])
    rows = [out.raw[100 * i : 100 * (i + 1)] for i in range(len(c))]
    assert all(row[width:] == b"\xee" * (100 - width) for row in rows)
    return [row[:width] for row in rows]


@given(
    rows=st.integers(1, 16), depth=st.integers(1, 16), columns=st.integers(1, 16),
    seed=st.integers(0, 99),
)  # fmt: skip
@some
def test_tdpbsud_sums_products_of_signed_and_unsigned_bytes(trap, rows, depth, columns, seed):
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    a, b = integers(-128, 128, rows, depth * 4), integers(0, 256, depth, columns, 4)
    c = integers(-(2**31), 2**31, rows, columns)
    want = c + a @ b.permute(0, 2, 1).reshape(depth * 4, columns)
    want = (want + 2**31) % 2**32 - 2**31
    got = multiplied(
        trap,
        trap.tile_dot_int8,
        [row.to(torch.int32).numpy().tobytes() for row in c],
        [row.to(torch.int8).numpy().tobytes() for row in a],
        [row.to(torch.uint8).numpy().tobytes() for row in b.flatten(1)],
    )
    values = torch.frombuffer(bytearray(b"".join(got)), dtype=torch.int32).view(rows, columns)
    assert torch.equal(values.long(), want)


def value(bits):
    """The number that 32 bits stand for; subnormal ones count as 0."""
    exponent, fraction = bits >> 23 & 0xFF, bits & 0x7FFFFF
    sign = -1 if bits >> 31 else 1
    return sign * Fraction(0x800000 + fraction) * Fraction(2) ** (exponent - 150) if exponent else 0


def rounded(x):
    """To 24 bits, to the nearest, ties to even; 0 below the smallest normal number."""
    if not x:
        return Fraction(0)
    exponent = 0
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    near = round(Fraction(x) / unit) * unit
    return near if abs(near) >= Fraction(2) ** -126 else Fraction(0)


wide = st.integers(0, 0xFFFF).map(lambda bits: bits & 0xBFFF)  # below 2: no sum overflows
near = st.builds(lambda sign, bits: sign << 15 | 0x3F00 + bits, st.booleans(), st.integers(0, 0xFF))
tiny = st.builds(lambda sign, bits: sign << 15 | 0x1F80 + bits, st.booleans(), st.integers(0, 0xFF))


def is_defined(trap, a, b, c):
    """One output of TDPBF16PS from pairs of halves a and b and a start c, all as bits."""
    parts = [Fraction(0), Fraction(0)]
    for i, (x, w) in enumerate(zip(a, b, strict=True)):
        parts[i % 2] = rounded(parts[i % 2] + value(x << 16) * value(w << 16))
    (row,) = multiplied(
        trap,
        trap.tile_dot_bf16,
        [struct.pack("<I", c)],
        [struct.pack(f"<{len(a)}H", *a)],
        [struct.pack("<2H", *b[i : i + 2]) for i in range(0, len(b), 2)],
    )
    (bits,) = struct.unpack("<I", row)
    assert value(bits) == rounded(value(c) + rounded(parts[0] + parts[1]))
    assert bits & 0x7FFFFFFF == 0 or bits & 0x7F800000 != 0  # nothing subnormal comes out


@given(data=st.data(), halves=st.sampled_from([wide, near, tiny]))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_tdpbf16ps_is_its_definition_bit_for_bit(trap, data, halves):
    depth = data.draw(st.integers(1, 16))
    pairs = st.lists(halves, min_size=2 * depth, max_size=2 * depth)
    c = data.draw(st.sampled_from([0, 0x3F800000, 0x00400000, 0x80000001]))
    is_defined(trap, data.draw(pairs), data.draw(pairs), c)


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        ([0x0040, 0], [0x7E00, 0], 0),  # a subnormal value times a large one
        ([0x7E00, 0], [0x8040, 0], 0),
        ([0x2000, 0], [0xA000, 0], 0x00C00000),  # normal values with a subnormal sum
        ([0x2000, 0x2000], [0x2040, 0xA000], 0),
        ([0x3F80, 0], [0x3F80, 0], 0x007FFFFF),  # a subnormal start
    ],
    ids=str,
)
def test_tdpbf16ps_has_no_subnormal_values(trap, a, b, c):
    is_defined(trap, a, b, c)


def test_sums_of_bf16_are_added_up_512_inputs_at_a_time(trap):
    rows, n, k = 3, 16, 1100
    packed, weight, bias = product(n, k, "bfloat16_dots")
    native.set_isa(STANDIN)
    x = torch.randn((rows, k)).bfloat16()
    total = torch.zeros(rows, n)
    for block in range(0, k, 512):
        part = [bytes(n * 4)] * rows
        for first in range(block, min(block + 512, k), 32):
            a, b = x[:, first : first + 32], weight[:, first : first + 32].bfloat16()
            pairs = b.view(torch.int16).unflatten(1, (-1, 2)).transpose(0, 1).flatten(1)
            part = multiplied(
                trap,
                trap.tile_dot_bf16,
                part,
                [row.numpy().tobytes() for row in a.contiguous().view(torch.int16)],
                [row.numpy().tobytes() for row in pairs.contiguous()],
            )
        total += torch.frombuffer(bytearray(b"".join(part)), dtype=torch.float32).view(rows, n)
    assert torch.equal(packed(x.float()), total + bias)


@pytest.mark.parametrize("rule", [{"quantization": "int8"}, {"dtype": "bfloat16"}], ids=str)
def test_a_model_runs_on_the_stand_in(rule):
    other = "avx512_bf16" if "avx512_bf16" in native.isas() else "avx2"
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
    prompts = ["Once upon a time there was", "The wolf"]
    results = []
    for name in (STANDIN, other):
        options = [f"isa={name}"]
        with LLM("demo", backend="cpu", max_model_len=128, backend_option=options, **rule) as llm:
            assert native.isa() == name
            assert native.bf16_dots() or name != STANDIN
            outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
            (alone,) = llm.generate([prompts[0]], params, use_tqdm=False)
            assert alone.outputs[0].logprobs == outputs[0].logprobs
            results.append(outputs)
    for ours, theirs in zip(*results, strict=True):
        if "quantization" in rule:
            assert ours.logprobs == theirs.logprobs
        else:
            first = theirs.token_ids[0]
            assert ours.token_ids[0] == first
            assert ours.logprobs[0][first].logprob == pytest.approx(
                theirs.logprobs[0][first].logprob, abs=0.05
            )
