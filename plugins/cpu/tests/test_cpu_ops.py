"""The CPU's kernels, in plain torch and native for each instruction set that this machine has: the
same numbers as the reference, and the same bits in whatever company.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenry.backend.base import StepBatch
from tokenry.backend.contract import Bucket
from tokenry.backend.reference import REFERENCE_OPS
from tokenry_cpu import native, native_ops, torch_ops
from tokenry_cpu.torch_ops import padded_rows

BLOCK = 32


class Torch:
    """The kernels in plain torch; `lay` brings KV [2, blocks, size, KH, D] into their layout."""

    name = "torch"
    ops = torch_ops.ops()

    @staticmethod
    def lay(kv):
        return kv.permute(1, 0, 3, 2, 4).contiguous()


class Native:
    """Those of one instruction set."""

    ops = native_ops.ops()

    def __init__(self, name):
        self.name = name

    @staticmethod
    def lay(kv):
        keys, values = kv.permute(0, 1, 3, 2, 4)  # [blocks, KH, size, D]
        if kv.dtype == torch.bfloat16:  # in pairs, with a zero behind an odd head
            odd = kv.shape[4] % 2
            keys = torch.nn.functional.pad(keys, (0, odd)).unflatten(3, (-1, 2)).transpose(2, 3)
            values = values.unflatten(2, (-1, 2)).transpose(3, 4).flatten(2)
            values = torch.nn.functional.pad(values, (0, odd * kv.shape[2]))
            return torch.stack((keys.flatten(2), values), dim=2).contiguous()
        both = torch.stack((keys.transpose(2, 3).flatten(2), values.flatten(2)), dim=2)
        return both.contiguous()


@pytest.fixture(params=["torch", *native.isas(), *native.standins()], scope="module")
def kernels(request):
    """One set of kernels after the other."""
    if request.param == "torch":
        yield Torch()
        return
    assert native.set_isa(request.param)
    yield Native(request.param)
    native.set_isa(native.isas()[0])


class Cache:
    """One layer's KV with requests of given lengths in shuffled blocks."""

    def __init__(self, lengths, *, heads=4, kv_heads=2, head_dim=32, seed=0, dtype=None):
        dtype, rng = dtype or torch.float32, np.random.default_rng(seed)
        self.lengths, self.heads, self.kv_heads, self.head_dim = lengths, heads, kv_heads, head_dim
        counts = [-(-n // BLOCK) for n in lengths]
        self.width = max(counts) + 2
        blocks = list(rng.permutation(np.arange(1, sum(counts) + 4)))
        self.num_blocks = sum(counts) + 4
        self.tables = [[int(blocks.pop()) for _ in range(c)] for c in counts]
        self.q, self.k, self.v = (
            [
                torch.from_numpy(rng.standard_normal((n, h, head_dim), np.float32)).to(dtype)
                for n in lengths
            ]
            for h in (heads, kv_heads, kv_heads)
        )
        self.dtype = dtype
        self.stale = 37.0  # what lies in the slots that nobody wrote

    def run(self, rows, *, kernels=None, **rule):
        """Attention of rows (request, cached, new), each row's result [new, H * D]; by the
        reference without kernels.
        """
        op = kernels.ops["attention"] if kernels else REFERENCE_OPS["attention"]
        shape = (2, self.num_blocks, BLOCK, self.kv_heads, self.head_dim)
        kv = torch.full(shape, self.stale, dtype=self.dtype)
        slots, positions = [], []
        q_lens = [new for _, _, new in rows]
        for request, cached, new in rows:
            table = self.tables[request]
            at = [table[p // BLOCK] * BLOCK + p % BLOCK for p in range(cached + new)]
            old = torch.tensor(at[:cached], dtype=torch.long)
            kv.flatten(1, 2)[0][old] = self.k[request][:cached]
            kv.flatten(1, 2)[1][old] = self.v[request][:cached]
            slots += at[cached:]
            positions += range(cached, cached + new)
        if kernels:
            kv = kernels.lay(kv)

        def ints(values):
            return torch.tensor(values, dtype=torch.int32)

        batch = StepBatch(
            bucket=Bucket("mixed", len(rows), len(slots), 0),
            token_ids=ints([0] * len(slots)),
            positions=ints(positions),
            slots=ints(slots),
            q_start=ints([0, *np.cumsum(q_lens)]),
            q_lens=ints(q_lens),
            seq_lens=ints([c + n for _, c, n in rows]),
            block_table=ints(
                [self.tables[r] + [0] * (self.width - len(self.tables[r])) for r, _, _ in rows]
            ),
            logit_rows=ints([0] * len(rows)),
            extra={},
        )
        q, k, v = (
            torch.cat([xs[r][c : c + n] for r, c, n in rows]) for xs in (self.q, self.k, self.v)
        )
        out = op(q, k, v, kv, batch, scale=self.head_dim**-0.5, **rule)
        return out.split(q_lens)


@pytest.mark.parametrize("rule", [{}, {"window": 40}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [20, 33, 64])
def test_attention_agrees_with_the_reference(kernels, rule, dtype, head_dim):
    cache = Cache([200, 1, 33, 300, 128], dtype=dtype, head_dim=head_dim, heads=6)
    rows = [(0, 130, 70), (1, 0, 1), (2, 32, 1), (3, 299, 1), (4, 0, 128)]
    got = cache.run(rows, kernels=kernels, **rule)
    want = cache.run(rows, **rule)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(data=st.data())
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_attention_bits_depend_on_neither_company_nor_chunking(kernels, data):
    head_dim = data.draw(st.sampled_from([8, 32, 64, 128]))
    heads, kv_heads = data.draw(st.sampled_from([(4, 4), (6, 2), (4, 1)]))
    lengths = data.draw(st.lists(st.integers(1, 600), min_size=1, max_size=6))
    rule = data.draw(st.sampled_from([{}, {"window": 100}, {"softcap": 3.0}]))
    cache = Cache(lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim, seed=len(lengths))
    whole = [cache.run([(r, 0, n)], kernels=kernels, **rule)[0] for r, n in enumerate(lengths)]
    rows = []
    for request, length in enumerate(lengths):
        start = data.draw(st.integers(0, length - 1))
        rows.append((request, start, data.draw(st.sampled_from([1, length - start]))))
    for (request, start, new), got in zip(
        rows, cache.run(rows, kernels=kernels, **rule), strict=True
    ):
        assert torch.equal(got, whole[request][start : start + new])


def test_many_single_tokens_give_the_bits_of_one_long_prompt(kernels):
    cache = Cache([260], heads=12, kv_heads=4, head_dim=64)
    whole = cache.run([(0, 0, 260)], kernels=kernels)[0]
    for position in (0, 1, 127, 128, 129, 255, 259):
        (row,) = cache.run([(0, position, 1)], kernels=kernels)
        assert torch.equal(row[0], whole[position])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("inner", "outer"), [(64, 96), (256, 768), (2048, 300), (40, 1000)])
def test_linear_rows_keep_their_bits_and_agree_with_the_reference(kernels, dtype, inner, outer):
    torch.manual_seed(0)
    weights = {"weight": torch.randn(outer, inner) / inner**0.5, "bias": torch.randn(outer)}
    weights = {name: w.to(dtype) for name, w in weights.items()}
    x = torch.randn(40, inner).to(dtype)
    op = kernels.ops["linear"]
    packed = op.pack(weights)
    full = op(x, packed)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    want = REFERENCE_OPS["linear"](x, weights)
    torch.testing.assert_close(full, want, rtol=tolerance, atol=tolerance)
    for rows in (1, 2, 3, 5, 8, 17, 33):
        for start in (0, 3):
            assert torch.equal(op(x[start : start + rows], packed), full[start : start + rows])


def small_ops(ops, x, weight, *rotated):
    """Everything but attention and linear, row by row."""
    y, total = ops["rms_norm"](x, weight, 1e-6, x * 2)
    return (
        y,
        total,
        ops["rms_norm"](x, weight, 1e-6),
        ops["act_mul"](x, "silu"),
        ops["act_mul"](x, "gelu_tanh"),
        *ops["rope"](*rotated),
    )


@pytest.mark.parametrize("rotary", [32, 24], ids=["whole", "partial"])
def test_the_small_ops_keep_their_bits_and_agree_with_the_reference(kernels, rotary):
    torch.manual_seed(0)
    x, weight = torch.randn(37, 96), torch.randn(96)
    q, k = torch.randn(37, 4, 32), torch.randn(37, 2, 32)
    positions = torch.randint(0, 50, (37,), dtype=torch.int32)
    table = torch.randn(50, 2, rotary // 2)
    full = small_ops(kernels.ops, x, weight, q, k, positions, table)
    torch.testing.assert_close(
        kernels.ops["act_mul"](x, "gelu"), REFERENCE_OPS["act_mul"](x, "gelu"), rtol=2e-6, atol=2e-6
    )
    want = small_ops(REFERENCE_OPS, x, weight, q, k, positions, table)
    for a, b in zip(full, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 36)):
        part = small_ops(kernels.ops, x[rows], weight, q[rows], k[rows], positions[rows], table)
        for a, b in zip(part, full, strict=True):
            assert torch.equal(a, b[rows])
        if kernels.name != "torch":  # torch's error function has other bits in a vector's tail
            part = kernels.ops["act_mul"](x[rows], "gelu")
            assert torch.equal(part, kernels.ops["act_mul"](x, "gelu")[rows])


@pytest.mark.parametrize("renormalize", [True, False])
def test_experts_agree_with_the_reference_and_keep_their_bits(kernels, renormalize):
    torch.manual_seed(0)
    weights = {"w13": torch.randn(6, 64, 48) / 7, "w2": torch.randn(6, 48, 32) / 6}
    x, router = torch.randn(21, 48), torch.randn(21, 6)
    rule = {"top_k": 2, "renormalize": renormalize, "kind": "silu"}
    packed = kernels.ops["moe"].pack(weights)
    full = kernels.ops["moe"](x, router, packed, **rule)
    want = REFERENCE_OPS["moe"](x, router, weights, **rule)
    torch.testing.assert_close(full, want, rtol=1e-4, atol=1e-5)
    for rows in (slice(0, 1), slice(4, 11)):
        assert torch.equal(kernels.ops["moe"](x[rows], router[rows], packed, **rule), full[rows])


def test_linear_computes_few_different_row_counts():
    counts = {padded_rows(rows) for rows in range(1, 2049)}
    assert len(counts) < 32
    assert 1 not in counts
    assert all(rows <= padded_rows(rows) <= max(2, 1.5 * rows + 2) for rows in range(1, 2049))


def dequantised(weight, format):
    """The weight as the format's definition has it: by channel, or by channel and 64 inputs."""
    if format == "int8":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return torch.round(weight / scale) * scale
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 64)).unflatten(1, (-1, 64))
    least, best = torch.full(groups.shape[:2], torch.inf), torch.zeros(groups.shape)
    top = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    for sign in (-1, 1):
        for step in range(-7, 8):
            scale = sign * top / (8 + 0.15 * step)
            levels = torch.round(groups / scale).nan_to_num().clamp(-8, 7)
            norm = (levels * levels).sum(2, keepdim=True).clamp(min=1)
            fitted = (levels * groups).sum(2, keepdim=True) / norm
            levels = torch.round(groups / fitted).nan_to_num().clamp(-8, 7)
            error = ((levels * fitted - groups) ** 2).sum(2)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better[..., None], levels * fitted, best)
    return best.flatten(1)[:, : weight.shape[1]]


@pytest.mark.parametrize("isa", [*native.isas(), *native.standins()])
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize(("inner", "outer"), [(64, 96), (768, 300), (40, 33), (1, 1)])
def test_quantised_linear_is_its_format_s_and_rows_keep_their_bits(isa, format, inner, outer):
    assert native.set_isa(isa)
    torch.manual_seed(0)
    weight, bias = torch.randn(outer, inner), torch.randn(outer)
    x = torch.randn(50, inner)
    op = native_ops.Linear()
    packed = op.quantize({"weight": weight, "bias": bias}, format)
    full = op(x, packed)
    group = inner if format == "int8" else 64
    padded = torch.nn.functional.pad(x, (0, -inner % group)).unflatten(1, (-1, group))
    scale = padded.abs().amax(2, keepdim=True) / 127
    rounded = (torch.round(padded / scale).nan_to_num() * scale).flatten(1)[:, :inner]
    want = rounded @ dequantised(weight, format).T + bias
    error = (full - want).norm() / want.norm()
    assert error < (1e-6 if format == "int8" else 2e-2)  # int4: ties between scales may differ
    exact = x @ weight.T + bias
    assert (full - exact).norm() / exact.norm() < (0.02 if format == "int8" else 0.13)
    for rows in (1, 2, 7, 13, 25, 49):
        assert torch.equal(op(x[1 : 1 + rows], packed), full[1 : 1 + rows])
    native.set_isa(native.isas()[0])


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_activation_is_seen_in_its_row_only(format, broken):
    op = native_ops.Linear()
    packed = op.quantize({"weight": torch.randn(40, 64)}, format)
    x = torch.randn(5, 64)
    x[2, 33] = broken
    y = op(x, packed)
    assert not torch.isfinite(y[2]).any()
    assert torch.isfinite(y[[0, 1, 3, 4]]).all()


def test_weights_that_fit_in_16_bits_stay_in_16_bits():
    wide = torch.randn(70, 50)
    for weight, format in (
        (wide, "float32"),
        (wide.bfloat16().float(), "bfloat16"),
        (wide.half().float(), "float16"),
    ):
        packed = native_ops.Linear().pack({"weight": weight})["packed"]
        assert packed.format == format
        torch.testing.assert_close(packed(torch.eye(50)), weight.T, rtol=0, atol=0)


def test_what_another_request_left_in_a_block_is_never_read(kernels):
    cache = Cache([40])
    want = cache.run([(0, 39, 1)], kernels=kernels)[0]
    cache.stale = float("nan")
    assert torch.equal(cache.run([(0, 39, 1)], kernels=kernels)[0], want)
