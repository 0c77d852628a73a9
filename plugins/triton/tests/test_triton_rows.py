"""Row kernels against the reference ops."""

from __future__ import annotations

import pytest
import torch

from tokenry.backend.reference import REFERENCE_OPS
from tokenry.conformance.compare import difference
from tokenry_triton.ops import triton_ops

OPS = triton_ops("sm_90")
DTYPES = ("float32", "float16", "bfloat16")


def values(shape, dtype="float32", *, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(getattr(torch, dtype))


def wide(x):
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_same(name, dtype, *args, **kwargs):
    """The op gives what the reference gives in float32, in the dtype of the first argument."""
    got = OPS[name](*args, **kwargs)
    want = REFERENCE_OPS[name](*map(wide, args), **{k: wide(v) for k, v in kwargs.items()})
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        assert a.dtype == getattr(torch, dtype)
        assert a.is_contiguous()
        assert difference(a.float().numpy(), b.double().numpy(), dtype) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_normalises_rows_of_any_length(dtype, residual):
    x, other = values((5, 80), dtype, scale=30.0), values((5, 80), dtype, seed=1)
    weight = 1 + values((80,), seed=2)
    assert_same("rms_norm", dtype, x, weight, 1e-5, other if residual else None)


def test_rms_norm_takes_heads_of_a_wider_product():
    x = values((3, 6, 32), "bfloat16")[:, 1:4]
    assert_same("rms_norm", "bfloat16", x, values((32,), "bfloat16", seed=1), 1e-6)


def test_rms_norm_of_tiny_rows_is_held_by_eps():
    assert_same("rms_norm", "float32", values((2, 48), scale=1e-4), torch.ones(48), 1e-5)


def test_a_sum_with_the_residual_is_rounded_as_the_reference_rounds_it():
    x, other = values((4, 64), "bfloat16"), values((4, 64), "bfloat16", seed=1)
    _, total = OPS["rms_norm"](x, torch.ones(64), 1e-6, other)
    assert torch.equal(total, x + other)


@pytest.mark.parametrize(
    ("dim", "rot", "dtype"),
    [(32, 32, "float32"), (64, 32, "bfloat16"), (80, 80, "float16"), (96, 24, "float32")],
)
def test_rope_turns_the_first_dims_of_views(dim, rot, dtype):
    product = values((7, 14 * dim), dtype).view(7, 14, dim)
    q, k, _ = product.split_with_sizes((10, 2, 2), 1)
    angles = torch.arange(64)[:, None] / 100 ** (torch.arange(rot // 2) / (rot // 2))
    table = torch.stack((angles.cos(), angles.sin()), dim=1)
    positions = torch.tensor([0, 1, 63, 7, 7, 30, 2], dtype=torch.int32)
    assert_same("rope", dtype, q, k, positions, table)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_act_mul_of_large_and_small_values(kind, dtype):
    assert_same("act_mul", dtype, values((3, 2 * 72), dtype, scale=6.0), kind)


def test_an_unknown_activation_is_refused_by_name():
    assert not OPS["act_mul"].supports(kind="relu", dtype="float32")
    with pytest.raises(ValueError, match="'relu'"):
        OPS["act_mul"](torch.zeros(1, 4), "relu")


@pytest.mark.parametrize("name", ["rms_norm", "act_mul"])
def test_no_rows_give_no_rows(name):
    args = (torch.ones(16), 1e-6) if name == "rms_norm" else ("silu",)
    assert OPS[name](torch.empty(0, 16), *args).shape[0] == 0
