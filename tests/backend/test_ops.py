"""The op table, and the reference ops other than attention against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokenry.backend.base import SampleInputs
from tokenry.backend.ops import OpTable
from tokenry.backend.reference import REFERENCE_OPS, ReferenceOp
from tokenry.errors import BackendError

OPS = REFERENCE_OPS


class HalfLinear(ReferenceOp):
    def supports(self, **meta):
        return meta.get("dtype") == "float16"

    def __call__(self, x, weights):
        return x


def test_an_op_that_cannot_falls_back_and_is_counted():
    op = HalfLinear()
    table = OpTable({"linear": op})
    assert table.resolve("linear", dtype="float16") is op
    assert table.fallbacks == {}
    assert table.resolve("linear", dtype="float32") is OPS["linear"]
    assert table.resolve("rope") is OPS["rope"]
    assert table.fallbacks == {"linear": 1, "rope": 1}


@pytest.mark.parametrize(
    ("ops", "words"),
    [({"lineer": HalfLinear()}, "did you mean 'linear'"), ({"linear": object()}, "lacks supports")],
    ids=["unknown_name", "no_op"],
)
def test_an_op_that_is_none_is_refused(ops, words):
    with pytest.raises(BackendError, match=words):
        OpTable(ops)


def test_linear_is_the_product_with_the_transposed_weight():
    x, w, b = torch.randn(3, 5), torch.randn(7, 5), torch.randn(7)
    got = OPS["linear"](x, OPS["linear"].pack({"weight": w, "bias": b}))
    np.testing.assert_allclose(got, x.numpy() @ w.numpy().T + b.numpy(), rtol=1e-5, atol=1e-5)


def test_rms_norm_gives_the_sum_it_normalised():
    x, r, w = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    y, total = OPS["rms_norm"](x, w, 1e-5, r)
    want = (x + r) / torch.sqrt((x + r).square().mean(-1, keepdim=True) + 1e-5) * w
    assert torch.equal(total, x + r)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(OPS["rms_norm"](x + r, w, 1e-5), want)


def test_rope_turns_each_pair_by_its_angle_and_leaves_the_rest():
    angles = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    table = torch.stack((angles.cos(), angles.sin()), dim=1)
    q, k = torch.randn(2, 3, 6), torch.randn(2, 1, 6)
    positions = torch.tensor([1, 0], dtype=torch.int32)
    for x, y in zip((q, k), OPS["rope"](q, k, positions, table), strict=True):
        for t in range(2):
            for pair in range(2):
                a = angles[positions[t], pair]
                turned = torch.complex(x[t, :, pair], x[t, :, pair + 2]) * torch.polar(
                    torch.tensor(1.0), a
                )
                torch.testing.assert_close(y[t, :, pair], turned.real)
                torch.testing.assert_close(y[t, :, pair + 2], turned.imag)
        assert torch.equal(y[..., 4:], x[..., 4:])


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + math.tanh(0.7978845608 * (x + 0.044715 * x**3)))),
    ],
)
def test_act_mul_gates_the_second_half(kind, function):
    x = torch.tensor([[-1.5, 0.5, 2.0, 3.0]])
    want = [function(-1.5) * 2.0, function(0.5) * 3.0]
    np.testing.assert_allclose(OPS["act_mul"](x, kind)[0], want, rtol=1e-5)


@pytest.mark.parametrize("renormalize", [True, False])
def test_moe_mixes_the_chosen_experts(renormalize):
    rng = np.random.default_rng(0)
    x, router = rng.standard_normal((4, 5)), rng.standard_normal((4, 3))
    w13, w2 = rng.standard_normal((3, 6, 5)), rng.standard_normal((3, 5, 3))
    p = np.exp(router) / np.exp(router).sum(1, keepdims=True)
    want = np.zeros_like(x)
    for t in range(4):
        chosen = np.argsort(-p[t])[:2]
        gates = p[t, chosen] / (p[t, chosen].sum() if renormalize else 1)
        for gate, e in zip(gates, chosen, strict=True):
            h = w13[e] @ x[t]
            want[t] += gate * (w2[e] @ (h[:3] / (1 + np.exp(-h[:3])) * h[3:]))
    tensors = [torch.from_numpy(a).float() for a in (x, router, w13, w2)]
    weights = OPS["moe"].pack({"w13": tensors[2], "w2": tensors[3]})
    got = OPS["moe"](*tensors[:2], weights, top_k=2, renormalize=renormalize, kind="silu")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# ---- sample --------------------------------------------------------------------------------------


def draw(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5, **flags):
    """Sample of logits [R, V]; each setting one number or one per row."""
    rows = len(logits)

    def column(value, dtype=torch.float32):
        return torch.as_tensor(np.broadcast_to(value, (rows,)).copy(), dtype=dtype)

    inputs = SampleInputs(
        temperature=column(temperature),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p),
        min_p=column(min_p),
        uniform=column(uniform),
        **flags,
    )
    return OPS["sample"](torch.as_tensor(logits, dtype=torch.float32), inputs).tolist()


P = np.array([0.1, 0.4, 0.2, 0.3])
GRID = (np.arange(1000) + 0.5) / 1000


def shares(**settings):
    """How often each of four tokens with probabilities P is drawn over an even grid of uniforms."""
    ids = draw(np.log(np.tile(P, (1000, 1))), uniform=GRID, **settings)
    return np.bincount(ids, minlength=4) / 1000


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, P),
        ({"any_filter": False}, P),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.0}, [0, 1, 0, 0]),
        ({"min_p": 0.5}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"temperature": 1e-6}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(settings, want):
    np.testing.assert_allclose(shares(**settings), want, atol=2e-3)


def test_of_equal_logits_greedy_takes_the_lowest_id():
    assert draw([[1.0, 3.0, 3.0]] * 2, temperature=0.0) == [1, 1]
    assert draw([[1.0, 3.0, 3.0]] * 2, temperature=0.0, all_greedy=True) == [1, 1]


def test_the_greatest_uniform_takes_the_last_token_that_can_be_drawn():
    top = float(np.nextafter(np.float32(1), np.float32(0)))
    assert draw([[0.0, 0.0, -np.inf]], uniform=top) == [1]
    assert draw([[-np.inf, 0.0, 0.0]], uniform=0.0) == [1]


def test_a_draw_does_not_depend_on_other_rows_or_on_the_batch_flags():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((32, 500)).astype(np.float32) * 3
    settings = {
        "temperature": rng.choice([0.0, 0.7, 1.3], 32),
        "top_k": rng.choice([0, 5, 50], 32),
        "top_p": rng.choice([1.0, 0.9], 32),
        "min_p": rng.choice([0.0, 0.05], 32),
        "uniform": rng.random(32, np.float32),
    }
    together = draw(logits, **settings)
    for row in range(32):
        mine = {name: values[row] for name, values in settings.items()}
        plain = mine["top_k"] == 0 and mine["top_p"] == 1 and mine["min_p"] == 0
        alone = draw(logits[row : row + 1], **mine, any_filter=not plain)
        assert alone == [together[row]]


class Quantised(ReferenceOp):
    def quantize(self, weights, format):
        return {"format": format}


def test_weights_are_packed_in_the_format_that_was_asked_and_a_head_keeps_8_bits():
    op, weights = Quantised(), {"weight": torch.ones(1, 1)}
    assert OpTable().pack(op, weights) == weights
    for format, head in (("int8", "int8"), ("int4", "int8")):
        table = OpTable(quantization=format)
        assert table.pack(op, weights) == {"format": format}
        assert table.pack(op, weights, head=True) == {"format": head}


def test_quantised_weights_are_refused_where_the_op_has_none():
    with pytest.raises(BackendError, match=r"int8.*no quantised weights"):
        OpTable(quantization="int8").pack(OPS["linear"], {"weight": torch.ones(1, 1)})
