"""Long contexts that threads share, and KV in 8 bits: near the reference, the same bits always."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from tokenry import LLM, SamplingParams
from tokenry.backend.base import StepBatch
from tokenry.backend.contract import Bucket, KVSpec
from tokenry.errors import ConfigError
from tokenry_cpu import native, native_ops
from tokenry_cpu.backend import CpuBackend, CpuOptions

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
SIZE = 32


@pytest.fixture(params=native.isas())
def isa(request):
    """One instruction set after the other; afterwards one thread again."""
    assert native.set_isa(request.param)
    native.set_threads(1)
    yield request.param
    native.set_threads(1)
    native.set_isa(native.isas()[0])


class Context:
    """Requests whose tokens come in steps, over KV of any dtype in blocks of their own."""

    def __init__(self, lengths, dtype, *, heads=4, kv_heads=2, head_dim=32, size=SIZE):
        self.size = size
        generator = torch.Generator().manual_seed(sum(lengths))
        self.q, self.k, self.v = (
            [torch.randn((n, h, head_dim), generator=generator) for n in lengths]
            for h in (heads, kv_heads, kv_heads)
        )
        counts = [-(-n // size) for n in lengths]
        starts = [1 + sum(counts[:i]) for i in range(len(lengths))]
        self.width = max(counts)
        self.tables = [list(range(s, s + c)) for s, c in zip(starts, counts, strict=True)]
        self.kv = torch.zeros(
            native.kv_shape(1 + sum(counts), kv_heads, head_dim, size, dtype), dtype=dtype
        )
        self.scale = head_dim**-0.5

    def step(self, rows, **rule):
        """Attention of rows (request, cached, new); the results one by one."""
        q_lens = [new for _, _, new in rows]
        slots = [
            self.tables[r][p // self.size] * self.size + p % self.size
            for r, cached, new in rows
            for p in range(cached, cached + new)
        ]

        def ints(values):
            return torch.tensor(values, dtype=torch.int32)

        batch = StepBatch(
            bucket=Bucket("mixed", len(rows), len(slots), 0),
            token_ids=ints(slots),
            positions=ints(slots),
            slots=ints(slots),
            q_start=ints([sum(q_lens[:i]) for i in range(len(rows) + 1)]),
            q_lens=ints(q_lens),
            seq_lens=ints([c + n for _, c, n in rows]),
            block_table=ints(
                [self.tables[r] + [0] * (self.width - len(self.tables[r])) for r, _, _ in rows]
            ),
            logit_rows=ints([0]),
            extra={},
        )
        parts = (
            torch.cat([xs[r][c : c + n] for r, c, n in rows]) for xs in (self.q, self.k, self.v)
        )
        out = native_ops.Attention()(*parts, self.kv, batch, scale=self.scale, **rule)
        return out.split(q_lens)

    def exact(self, request, *, window=None, softcap=None):
        """The same of all rows of a request in float64."""
        q, k, v = (xs[request].double() for xs in (self.q, self.k, self.v))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        ahead = torch.arange(len(k))[None] - torch.arange(len(q))[:, None]
        hidden = ahead > 0
        if window:
            hidden = hidden | (ahead <= -window)
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


@functools.cache
def exact_of(length, **rule):
    """What every dtype and instruction set should give for one request."""
    return Context([length], torch.float32).exact(0, **rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [{}, {"window": 1500}, {"softcap": 5.0}], ids=str)
def test_a_long_context_is_near_the_exact_result(isa, dtype, rule):
    context = Context([2500], dtype)
    (got,) = context.step([(0, 0, 2500)], **rule)
    exact = exact_of(2500, **rule)
    error = ((got - exact).norm() / exact.norm()).item()
    most = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.int8: 1.5e-2}
    assert error < most[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "size"), [(1, 32), (33, 16), (64, 64), (80, 128), (64, 16)])
def test_heads_and_blocks_of_any_size_are_near_the_exact_result(isa, dtype, head_dim, size):
    context = Context([301, 5], dtype, head_dim=head_dim, size=size)
    first = context.step([(0, 0, 300), (1, 0, 5)])
    (last,) = context.step([(0, 300, 1)])
    got = [torch.cat([first[0], last]), first[1]]
    most = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.int8: 2e-2}
    for request, row in enumerate(got):
        exact = context.exact(request)
        assert ((row - exact).norm() / exact.norm()).item() < most[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [{}, {"window": 1100}, {"softcap": 5.0}], ids=str)
def test_bits_depend_on_neither_threads_nor_company_nor_chunks(isa, dtype, rule):
    lengths = [3100, 40, 1025]
    context = Context(lengths, dtype)
    alone = [context.step([(r, 0, n)], **rule)[0] for r, n in enumerate(lengths)]
    for threads in (1, 2, 7):
        native.set_threads(threads)
        for rows in (
            [(0, 3099, 1)],
            [(0, 2047, 1), (2, 1024, 1)],
            [(1, 39, 1), (0, 3000, 100), (2, 1000, 25)],
            [(0, 1023, 3)],
        ):
            for (request, cached, new), got in zip(rows, context.step(rows, **rule), strict=True):
                assert torch.equal(got, alone[request][cached : cached + new])


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_broken_key_of_any_piece_is_seen_after_it_only(isa, dtype, broken):
    context = Context([2200], dtype)
    context.k[0][1200] = broken
    for threads in (1, 2):
        native.set_threads(threads)
        (got,) = context.step([(0, 0, 2200)])
        assert torch.isfinite(got[:1200]).all()
        assert not torch.isfinite(got[2199]).any()
        (row,) = context.step([(0, 2199, 1)])
        assert not torch.isfinite(row).any()


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e37])
def test_int8_kv_holds_zeros_and_the_ends_of_the_range(value):
    context = Context([5], torch.int8)
    context.k[0].zero_()
    context.v[0].fill_(value)
    (got,) = context.step([(0, 0, 5)])
    torch.testing.assert_close(got, torch.full(got.shape, value), rtol=1e-6, atol=0)


def test_int8_kv_takes_a_quarter_and_the_plan_has_more_blocks():
    wide, narrow = CpuBackend(CpuOptions(threads=1)), CpuBackend(CpuOptions(threads=1, kv="int8"))
    spec = KVSpec(num_layers=2, num_kv_heads=4, head_dim=64, block_size=16, dtype="float32")
    (layer, _) = narrow.alloc_kv(spec, 10)
    assert layer.dtype == torch.int8
    assert layer.nbytes * 2 == 10 * spec.block_bytes * (64 + 4) // 256
    budget = narrow.memory().total
    more, few = narrow.plan_kv(spec, budget, None), wide.plan_kv(spec, budget, None)
    assert 3.5 < more.num_blocks / few.num_blocks < 4
    assert more.ledger["kv"] == more.num_blocks * 2 * layer.nbytes // 10


def test_bfloat16_kv_of_an_odd_head_is_planned_as_large_as_it_is():
    backend = CpuBackend(CpuOptions(threads=1))
    spec = KVSpec(num_layers=2, num_kv_heads=4, head_dim=33, block_size=16, dtype="bfloat16")
    layers = backend.alloc_kv(spec, 10)
    plan = backend.plan_kv(spec, backend.memory().total, None)
    assert plan.ledger["kv"] * 10 == plan.num_blocks * sum(layer.nbytes for layer in layers)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="asks Linux")
def test_kv_has_small_pages_whatever_the_system_makes_of_others():
    """A step that first touches huge ones, of all layers at once, waits until they are cleared."""
    spec = KVSpec(num_layers=1, num_kv_heads=4, head_dim=64, block_size=16, dtype="float32")
    (layer,) = CpuBackend(CpuOptions(threads=1)).alloc_kv(spec, 1000)
    at, here, flags = layer.data_ptr(), False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if region := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            here = int(region[1], 16) <= at < int(region[2], 16)
            flags += [region[3]] if here else []
        elif here and line.startswith("VmFlags:"):
            flags += line.split()
    assert "rw-s" in flags
    assert "hg" not in flags


def test_kv_options_are_checked():
    with pytest.raises(ConfigError, match="kv=int4"):
        CpuOptions.parse({"kv": "int4"})
    with pytest.raises(ConfigError, match="native kernels"):
        CpuBackend(CpuOptions(kernels="torch", kv="int8"))


def test_a_model_with_int8_kv_answers_alike_alone_and_among_others():
    prompts = ["Once upon a time there was", "The wolf", "a", "In a deep forest stood a house"]
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=1, ignore_eos=True)

    def answers(*options):
        with LLM("demo", backend="cpu", max_model_len=128, backend_option=options) as llm:
            together = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
            for prompt, want in zip(prompts, together, strict=True):
                (alone,) = llm.generate([prompt], params, use_tqdm=False)
                assert alone.outputs[0].token_ids == want.token_ids
                assert alone.outputs[0].logprobs == want.logprobs
        return together

    for near, want in zip(answers("kv=int8"), answers(), strict=True):
        first = want.token_ids[0]
        assert near.token_ids[0] == first
        expected = want.logprobs[0][first].logprob
        assert near.logprobs[0][first].logprob == pytest.approx(expected, abs=0.1)
