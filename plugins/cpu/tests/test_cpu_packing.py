"""Packed weights, value for value: what each format holds, whatever instruction set packed it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from tokenry_cpu import native

PANEL, GROUP = 32, 64


@pytest.fixture(scope="module", autouse=True)
def isa():
    """The kernels' instruction set is the caller's until the test is over."""
    before = native.isa()
    yield
    native.set_isa(before)


def weight(n: int, k: int, seed: int, kind: str) -> Tensor:
    """Float32 [n, k]; kinds that a careless sum, comparison or clamp would get wrong."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((n, k), generator=generator) * 0.02
    if kind == "ties":  # many magnitudes are the largest, levels lie between two
        values = torch.randint(-4, 5, (n, k), generator=generator) * 0.125
    elif kind == "outliers":
        values *= 10.0 ** torch.randint(-30, 12, (n, k), generator=generator)
    elif kind == "zeros":
        values *= torch.rand((n, k), generator=generator) > 0.95
    return values


def raw(packed: native.Weight, kind: torch.dtype, count: int, at: int = 0) -> Tensor:
    """Values of a packed weight's memory."""
    data = bytearray(packed.memory())
    return torch.frombuffer(data, dtype=kind, count=count, offset=at)


def padded(values: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros to whole panels and groups."""
    n, k = values.shape
    return torch.nn.functional.pad(values, (0, -k % columns, 0, -n % rows))


def int8_reference(values: Tensor) -> tuple[Tensor, Tensor]:
    """Levels 0 to 255 (128: zero) and a scale for each row."""
    top = values.abs().amax(1)
    # by a tensor: torch multiplies a number by the reciprocal, which is rounded once more
    inverse = torch.where(top > 0, torch.tensor(127.0) / top, 0.0)
    return (values * inverse[:, None]).round() + 128, top / 127.0


def int4_reference(values: Tensor) -> tuple[Tensor, Tensor]:
    """Levels 0 to 15 (8: zero) and a scale for each group of a row: the first with the least
    squared error of 30, sums in float32 in the order of the inputs.
    """
    n, k = values.shape
    groups = values.view(n, k // GROUP, GROUP)
    first = groups.abs().argmax(2, keepdim=True)
    at = groups.gather(2, first)[..., 0]
    best, least = torch.zeros_like(at), torch.full_like(at, float("inf"))
    for sign in (-1.0, 1.0):
        for step in range(-7, 8):
            divisor = torch.tensor(8.0) + torch.tensor(0.15) * torch.tensor(float(step))
            inverse = 1.0 / (sign * at / divisor)
            dot, norm = torch.zeros_like(at), torch.zeros_like(at)
            for i in range(GROUP):
                x = groups[..., i]
                q = (x * inverse).round().clamp(-8, 7)
                q = torch.where(q.isnan(), -8.0, q)
                dot, norm = dot + q * x, norm + q * q
            error = -dot * dot / norm
            better = (norm > 0) & (error < least)
            best = torch.where(better, dot / norm, best)
            least = torch.where(better, error, least)
    best = torch.where(at == 0, 0.0, best)
    scale = best[..., None]
    levels = torch.where(scale == 0, 0.0, groups / scale).round().clamp(-8, 7) + 8
    return levels.reshape(n, k), best


@pytest.mark.parametrize("name", native.isas())
@settings(max_examples=12, deadline=None)
@example(n=18, k=38, seed=55, kind="normal")  # a value all but between two levels
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["normal", "ties", "outliers", "zeros"]),
)
def test_int8_weights_are_their_rows_rounded(name, n, k, seed, kind):
    native.set_isa(name)
    values = weight(n, k, seed, kind)
    packed = native.Weight(values, None, "int8")
    levels, scales = int8_reference(padded(values, PANEL, 4))
    rows, depth = levels.shape
    got = raw(packed, torch.uint8, rows * depth).view(rows // PANEL, depth // 4, PANEL, 4)
    assert torch.equal(got.permute(0, 2, 1, 3).reshape(rows, depth).float(), levels)
    assert torch.equal(raw(packed, torch.float32, rows, rows * depth), scales)


@pytest.mark.parametrize("name", native.isas())
@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    seed=st.integers(0, 999),
    kind=st.sampled_from(["normal", "ties", "outliers", "zeros"]),
)
def test_int4_weights_are_those_of_the_best_of_thirty_scales(name, n, k, seed, kind):
    native.set_isa(name)
    values = weight(n, k, seed, kind)
    packed = native.Weight(values, None, "int4")
    levels, scales = int4_reference(padded(values, PANEL, GROUP))
    rows, depth = levels.shape
    panels, groups = rows // PANEL, depth // GROUP
    size = rows * depth // 2
    got = raw(packed, torch.uint8, size).view(panels, groups, GROUP // 8, PANEL, 4)
    both = torch.stack((got & 15, got >> 4), dim=4)  # [panels, groups, eighth, row, half, 4]
    unpacked = both.permute(0, 3, 1, 2, 4, 5).reshape(rows, depth)
    assert torch.equal(unpacked.float(), levels)
    held = raw(packed, torch.float32, rows * groups, size).view(panels, groups, PANEL)
    assert torch.equal(held.permute(0, 2, 1).reshape(rows, groups), scales)


@pytest.mark.parametrize("format", ["float32", "float16", "bfloat16"])
@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 70), k=st.integers(1, 50), seed=st.integers(0, 999))
def test_float_weights_are_moved_and_not_changed(format, n, k, seed):
    dtype = getattr(torch, format)
    values = weight(n, k, seed, "normal").to(dtype)
    pair = 2 if format == "bfloat16" else 1
    want = padded(values, PANEL, pair)
    rows, depth = want.shape
    got = raw(native.Weight(values, None, format), dtype, rows * depth)
    got = got.view(rows // PANEL, depth // pair, PANEL, pair).permute(0, 2, 1, 3)
    assert torch.equal(got.reshape(rows, depth), want)
