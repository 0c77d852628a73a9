"""What of Triton's kernels only a real GPU proves: that what the interpreter shows right is right
as it was compiled, for what the conformance kit does not ask for; skipped without one.

$GPU_KERNELS=interpreted tries these tests themselves on the simulated device.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

from tokenry.backend.reference import REFERENCE_OPS
from tokenry.conformance.compare import difference
from tokenry.conformance.paged import AttentionCase, Paged

pytestmark = pytest.mark.gpu

INTERPRETED = os.environ.get("GPU_KERNELS") == "interpreted"
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton_interpreter

    triton_interpreter.install()
MIXED = ((0, 17), (16, 1), (15, 3), (3, 21))
DECODE = ((15, 1), (5000, 1), (700, 1))
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
SINKS = (2.5, -1.0, 0.0, 7.0)
SCALES = ((0.02, 0.05), (0.01, 0.03))
if INTERPRETED:  # which takes its time
    MIXED, DECODE = ((0, 5), (15, 2)), ((15, 1), (18, 1))
    HEADS, SINKS = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}, SINKS[:2]
    SCALES = tuple(pair[:1] for pair in SCALES)


@pytest.fixture(scope="module")
def backend():
    """The GPU's, with Triton's kernels."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    from tokenry.backend.discovery import discover, open_backend

    usable = [p for p in discover() if p.state == "usable" and p.backend in ("cuda", "rocm")]
    if not usable:
        pytest.skip("no GPU can be used here (`tokenry devices` says why)")
    return open_backend(usable[0].device, {"kernels": "triton", "graphs": "none"})


def rows(backend, op, case, **extra):
    paged = Paged(backend, case)
    paged.op = partial(op, **extra)
    return paged.run().got[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("works", [MIXED, DECODE], ids=["mixed", "decode"])
def test_sinks(backend, works, dtype):
    case = AttentionCase(works=works, dtype=dtype, **HEADS)
    sinks = torch.tensor(SINKS, device=backend.caps.input_device)
    got, want = (
        rows(backend, op, case, sinks=sinks)
        for op in (backend.ops()["attention"], REFERENCE_OPS["attention"])
    )
    assert difference(got, want, dtype) is None


def test_float8_kv_with_scales(backend):
    if backend.caps.fp8 == "none":
        pytest.skip("the device has no float8")
    dtype = torch.float8_e4m3fn if backend.caps.fp8 == "e4m3fn" else torch.float8_e4m3fnuz
    device = backend.caps.input_device
    scales = torch.tensor(SCALES, device=device)
    for works in (MIXED, DECODE):
        case = AttentionCase(works=works, dtype="bfloat16", garbage=1.0, **HEADS)
        paged = Paged(backend, case)
        paged.kv = [layer.to(dtype) for layer in paged.kv]
        paged.op = partial(backend.ops()["attention"], kv_scales=scales)
        tried = paged.run()
        assert abs(tried.got[0] - tried.want[0]).max() < 0.25
        assert abs(tried.got[0] - tried.want[0]).mean() < 0.03


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("count", [1, 7, 33])
def test_narrow_products(backend, format, count):
    if format == "fp8" and backend.caps.fp8 == "none":
        pytest.skip("the device has no float8")
    from tokenry_triton.linear import Linear

    linear = backend.ops()["linear"]
    assert isinstance(linear, Linear)
    generator = torch.Generator().manual_seed(count)
    weight = (torch.randn(96, 200, generator=generator) * 0.1).to(backend.caps.input_device)
    x = torch.randn(count, 200, generator=generator).to(backend.caps.input_device, torch.bfloat16)
    got = linear(x, linear.quantize({"weight": weight}, format)).float()
    want = x.float() @ weight.T
    assert (got - want).square().sum() / want.square().sum() < (2e-2 if format == "int4" else 3e-3)


def test_a_row_has_the_same_bits_alone_as_in_a_batch(backend):
    whole = Paged(backend, AttentionCase(works=DECODE, dtype="bfloat16", **HEADS))
    alone = Paged(backend, AttentionCase(works=DECODE[1:2], dtype="bfloat16", **HEADS))
    alone.q, alone.k, alone.v = ([t[1]] for t in (whole.q, whole.k, whole.v))
    assert (whole.run().got[0][1] == alone.run().got[0][0]).all()


def test_a_tuned_tile_gives_the_same_answers(backend, tmp_path):
    from tokenry_triton.gpu.choice import milliseconds
    from tokenry_triton.ops import triton_ops
    from tokenry_triton.tune import Tuner

    timer = (lambda call: call() or 1.0) if INTERPRETED else milliseconds
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{10 * major + minor}"
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(0).gcnArchName.partition(":")[0]
    tuner = Tuner(arch, tmp_path, timer)
    tuned = triton_ops(arch, tuner=tuner)["attention"]
    case = AttentionCase(works=MIXED, dtype="bfloat16", **HEADS)
    with tuner.warm_up():
        rows(backend, tuned, case)
    assert tuner.measured >= 1
    assert tuner.path.exists()
    got, want = rows(backend, tuned, case), rows(backend, REFERENCE_OPS["attention"], case)
    assert difference(got, want, "bfloat16") is None


@pytest.mark.parametrize("name", ["flash", "flashinfer", "aiter"])
def test_a_library_that_is_installed_gives_the_same_answers(backend, name):
    from tokenry.backend.discovery import discover, open_backend
    from tokenry.errors import ConfigError

    device = next(p.device for p in discover() if p.backend in ("cuda", "rocm") and p.device)
    options = {"kernels": "torch", "graphs": "none", "attention": name}
    try:
        library = open_backend(device, options)
    except ConfigError as error:
        pytest.skip(str(error))
    block = library.caps.block_sizes[0]
    for works in (MIXED, DECODE):
        case = AttentionCase(works=works, dtype="bfloat16", block_size=block, **HEADS)
        tried = Paged(library, case).run()
        assert difference(tried.got[0], tried.want[0], "bfloat16") is None
