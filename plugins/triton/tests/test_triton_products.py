"""Linear and moe against the reference op, on the weights that were packed."""

from __future__ import annotations

import pytest
import torch

from tokenry.backend.reference import REFERENCE_OPS
from tokenry.conformance.compare import difference
from tokenry.errors import BackendError
from tokenry_triton.ops import triton_ops
from tokenry_triton.quantize import quantized

DTYPES = ("float32", "float16", "bfloat16")


def values(shape, dtype="float32", *, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(getattr(torch, dtype))


def restored(weight, format, fp8=torch.float8_e4m3fn):
    """Float values of a weight packed in a format, by another way than the kernels'."""
    packed = quantized(weight, format, fp8)
    if format != "int4":
        return packed.values.float() * packed.scales[..., None]
    pairs = packed.values.unflatten(-1, (-1, 32))
    levels = torch.stack((pairs & 15, pairs >> 4), dim=-2).float() - 8
    wide = levels.flatten(-3, -2) * packed.scales[..., None]
    return wide.flatten(-2)[..., : packed.size]


@pytest.mark.parametrize(("format", "worst"), [("int8", 1e-4), ("int4", 8e-3), ("fp8", 1.5e-3)])
def test_packed_weights_are_near_the_given_ones(format, worst):
    weight = values((24, 200), scale=0.1)
    weight[3] = 0
    error = (restored(weight, format) - weight).square().sum() / weight.square().sum()
    assert error < worst


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(
    ("rows", "inner", "outer", "dtype"),
    [(1, 64, 96, "float32"), (5, 200, 48, "bfloat16"), (33, 40, 100, "float16")],
)
def test_narrow_weights_multiply_as_what_they_stand_for(format, rows, inner, outer, dtype):
    linear = triton_ops("sm_90")["linear"]
    weights = {"weight": values((outer, inner), scale=0.1), "bias": values((outer,), seed=2)}
    x = values((rows, inner), dtype, seed=3)
    got = linear(x, linear.quantize(weights, format))
    stood_for = {**weights, "weight": restored(weights["weight"], format)}
    want = REFERENCE_OPS["linear"](x.float(), stood_for)
    assert got.dtype == x.dtype
    assert difference(got.float().numpy(), want.double().numpy(), dtype) is None


@pytest.mark.parametrize(
    ("arch", "fp8"), [("sm_90", torch.float8_e4m3fn), ("gfx942", torch.float8_e4m3fnuz)]
)
def test_float8_rows_times_float8_weights(arch, fp8):
    linear = triton_ops(arch)["linear"]
    weight = values((48, 96), scale=0.1)
    x = values((5, 96), "bfloat16", seed=3)
    packed = linear.quantize({"weight": weight}, "fp8")
    assert packed["narrow"].values.dtype == fp8
    got = linear(x, packed).float()
    want = x.float() @ restored(weight, "fp8", fp8).T
    assert (got - want).square().sum() / want.square().sum() < 2e-3


@pytest.mark.parametrize("name", ["linear", "moe"])
def test_float8_is_refused_where_the_device_has_none(name):
    weights = {n: torch.zeros(2, 4, 4) for n in ("weight", "w13", "w2")}
    with pytest.raises(BackendError, match="sm_80 has no float8"):
        triton_ops("sm_80")[name].quantize(weights, "fp8")


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_dense_rows_have_the_same_bits_alone(dtype):
    linear = triton_ops("sm_90", {"deterministic": "true"})["linear"]
    packed = linear.pack({"weight": values((40, 100), dtype, scale=0.1)})
    x = values((33, 100), dtype, seed=1)
    whole = linear(x, packed)
    want = REFERENCE_OPS["linear"](x.float(), {"weight": packed["weight"].float()})
    assert difference(whole.float().numpy(), want.double().numpy(), dtype) is None
    for start, end in ((0, 1), (30, 33), (7, 23)):
        assert torch.equal(linear(x[start:end], packed), whole[start:end])


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="int3"):
        triton_ops("sm_90")["linear"].quantize({"weight": torch.zeros(4, 4)}, "int3")


def experts(dtype="float32", *, format=None, rows=5, top_k=2, renormalize=True, kind="silu"):
    """(got, want) of a small mixture in which expert 3 is hardly ever chosen."""
    moe = triton_ops("sm_90")["moe"]
    weights = {"w13": values((4, 64, 48), dtype, seed=1, scale=0.15),
               "w2": values((4, 48, 32), dtype, seed=2, scale=0.15)}  # fmt: skip
    router = values((rows, 4), dtype, seed=4, scale=2.0)
    router[0] = torch.tensor([0.5, 2.0, 2.0, -1.0])
    router[1:, 3] -= 9
    x = values((rows, 48), dtype)
    rule = {"top_k": top_k, "renormalize": renormalize, "kind": kind}
    packed = moe.pack(weights) if format is None else moe.quantize(weights, format)
    stood_for = {
        n: w.float() if format is None else restored(w, format) for n, w in weights.items()
    }
    want = REFERENCE_OPS["moe"](x.float(), router.float(), stood_for, **rule)
    return moe(x, router, packed, **rule), want


def assert_near(pair, dtype):
    got, want = pair
    assert got.dtype == getattr(torch, dtype)
    assert difference(got.float().numpy(), want.double().numpy(), dtype) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "top_k", "renormalize"), [(1, 1, False), (33, 2, True), (5, 4, False)]
)
def test_moe_adds_up_the_experts_of_each_row(dtype, rows, top_k, renormalize):
    assert_near(experts(dtype, rows=rows, top_k=top_k, renormalize=renormalize), dtype)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
def test_moe_with_other_activations(kind):
    assert_near(experts(kind=kind), "float32")


@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
def test_experts_in_fewer_bits(format):
    assert_near(experts(format=format), "float32")


def test_moe_of_more_rows_than_one_tile_of_an_expert():
    assert_near(experts(rows=150, top_k=1), "float32")
