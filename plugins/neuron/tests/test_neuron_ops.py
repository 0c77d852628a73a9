"""The kernels against the reference, on the host: layouts, padding, the null block, the sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from tokenry.backend.base import SampleInputs, StepBatch
from tokenry.backend.contract import Bucket, HostBatch
from tokenry.backend.reference import Attention, Linear, Moe
from tokenry.backend.reference import Sample as ReferenceSample
from tokenry_neuron.ops import (
    NOWHERE,
    DenseMoe,
    KVLayer,
    PagedAttention,
    draw,
    draw_filtered,
    greedy,
    signed_inputs,
)
from tokenry_neuron.ops import Linear as NeuronLinear

BLOCK_SIZE, KV_HEADS, HEAD_DIM, BLOCKS = 4, 2, 8, 24


def host_batch(rows, *, Q, width, phase="prefill"):
    """HostBatch of (cached, new tokens) per row, right-padded to Q, with shuffled blocks."""
    S = len(rows)
    free = (1 + np.random.default_rng(5).permutation(BLOCKS - 1)).tolist()
    table = np.zeros((S, width), np.int32)
    positions, slots = np.zeros((2, S, Q), np.int32)
    for i, (cached, new) in enumerate(rows):
        used = -(-(cached + new) // BLOCK_SIZE)
        table[i, :used] = [free.pop() for _ in range(used)]
        at = np.arange(cached, cached + new)
        positions[i, :new] = at
        slots[i, :new] = table[i, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
    lens = np.array(rows, np.int32).reshape(S, 2)
    return HostBatch(
        bucket=Bucket(phase, S, S * Q, width),
        token_ids=np.zeros(S * Q, np.int32),
        positions=positions.reshape(-1),
        slots=slots.reshape(-1),
        q_start=np.arange(0, S * Q + 1, Q, dtype=np.int32),
        q_lens=lens[:, 1].copy(),
        seq_lens=lens.sum(1, dtype=np.int32),
        block_table=table,
        logit_rows=np.zeros(S, np.int32),
        prev_row=np.full(S * Q, -1, np.int32),
    )


def step_batch(host, extra):
    names = [n for n in StepBatch.__slots__ if n not in ("bucket", "extra")]
    tensors = {n: torch.from_numpy(getattr(host, n)) for n in names}
    return StepBatch(
        bucket=host.bucket, extra={k: torch.from_numpy(v) for k, v in extra.items()}, **tensors
    )


@pytest.mark.parametrize("rules", [{}, {"window": 5}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize(
    ("rows", "Q"),
    [([(0, 7)], 8), ([(6, 5)], 8), ([(9, 1), (0, 1), (15, 1)], 1), ([(3, 1), (0, 0)], 1)],
    ids=["prompt", "continued", "decode", "with an empty row"],
)
def test_attention_is_the_reference(rows, Q, rules):
    generator = torch.Generator().manual_seed(1)
    host = host_batch(rows, Q=Q, width=6)
    signed = step_batch(host, signed_inputs(host, BLOCK_SIZE))
    T, H = len(rows) * Q, 4
    q = torch.randn(T, H, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, T, KV_HEADS, HEAD_DIM, generator=generator)
    past = torch.randn(2, BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM, generator=generator)
    layer = KVLayer(
        k=past[0].clone().flatten(0, 1), v=past[1].clone().flatten(0, 1), block_size=BLOCK_SIZE
    )
    expected = Attention()(q, k, v, past, step_batch(host, {}), scale=0.3, **rules)
    got = PagedAttention()(q, k, v, layer, signed, scale=0.3, **rules)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    written = torch.stack((layer.k, layer.v)).view_as(past)
    assert torch.equal(written[:, 1:], past[:, 1:])


def test_what_is_not_a_requests_own_cannot_reach_it():
    """NaN in every block but its own, and in the unused slots of its last one."""
    host = host_batch([(5, 1)], Q=1, width=6, phase="decode")
    batch = step_batch(host, signed_inputs(host, BLOCK_SIZE))
    mine = torch.zeros(BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    held = [int(host.block_table[0, i // BLOCK_SIZE]) * BLOCK_SIZE + i % 4 for i in range(6)]
    mine[held] = True
    clean = torch.where(mine, 0.5, 0.0)[:, None, None].expand(-1, KV_HEADS, HEAD_DIM)
    dirty = torch.where(mine[:, None, None], clean, torch.nan)
    q = torch.ones(1, 4, HEAD_DIM)
    k = v = torch.ones(1, KV_HEADS, HEAD_DIM)
    outs = []
    for cache in (clean, dirty):
        layer = KVLayer(k=clean.clone(), v=cache.clone(), block_size=BLOCK_SIZE)
        outs.append(PagedAttention()(q, k, v, layer, batch, scale=1.0))
    assert torch.equal(outs[0], outs[1]) and outs[0].isfinite().all()


def test_the_null_block_is_nowhere_and_only_it():
    host = host_batch([(0, 3), (4, 1)], Q=4, width=3)
    signed = signed_inputs(host, BLOCK_SIZE)
    assert ((signed["signed_table"] == NOWHERE) == (host.block_table == 0)).all()
    assert ((signed["signed_slots"] == NOWHERE) == (host.slots < BLOCK_SIZE)).all()
    held = host.block_table > 0
    assert (signed["signed_table"][held] == host.block_table[held]).all()
    assert all(a.dtype == np.int32 for a in signed.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_and_experts_are_the_reference(dtype):
    generator = torch.Generator().manual_seed(2)

    def noise(*shape):
        return (0.3 * torch.randn(*shape, generator=generator)).to(dtype)

    x, logits = noise(9, 16), noise(9, 6)
    weights = {"weight": noise(12, 16), "bias": noise(12)}
    tolerance = (
        {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    )
    torch.testing.assert_close(NeuronLinear()(x, weights), Linear()(x, weights), **tolerance)
    experts = {"w13": noise(6, 20, 16), "w2": noise(6, 16, 10)}
    for renormalize in (False, True):
        rules = {"top_k": 2, "renormalize": renormalize, "kind": "silu"}
        torch.testing.assert_close(
            DenseMoe()(x, logits, experts, **rules), Moe()(x, logits, experts, **rules), **tolerance
        )


def inputs(R, **values):
    defaults = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "uniform": 0.5}
    floats = {n: torch.full((R,), float(values.get(n, d))) for n, d in defaults.items()}
    return SampleInputs(top_k=torch.full((R,), values.get("top_k", 0), dtype=torch.int32), **floats)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    vocab=st.sampled_from([1, 2, 17, 300, 1000]),
    top_k=st.sampled_from([0, 1, 2, 40, 256, 257, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 3.0]),
    ties=st.booleans(),
)
def test_the_sampler_draws_what_the_reference_draws(
    seed, vocab, top_k, top_p, min_p, temperature, ties
):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(16, vocab, generator=generator)
    if ties:
        logits = logits.round()
    rules = inputs(16, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    rules.uniform.copy_(torch.rand(16, generator=generator))
    expected = ReferenceSample()(logits, rules)
    got = draw_filtered(
        logits, rules.temperature, rules.uniform, rules.top_k, rules.top_p, rules.min_p
    )
    assert got.dtype == torch.int32
    # a target within rounding of a border may fall on either side of it
    assert (got != expected).sum() <= 1


def test_without_filters_all_ways_agree():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(4))
    cold = inputs(8, temperature=0.0)
    assert torch.equal(greedy(logits), draw(logits, cold.temperature, cold.uniform))
    warm = inputs(8, uniform=0.3)
    plain = draw(logits, warm.temperature, warm.uniform)
    assert torch.equal(
        plain,
        draw_filtered(logits, warm.temperature, warm.uniform, warm.top_k, warm.top_p, warm.min_p),
    )
    assert torch.equal(plain, ReferenceSample()(logits, warm))


def test_a_draw_at_the_end_of_the_range_is_a_token_with_mass():
    logits = torch.tensor([[0.0, 0.0, -200.0, -200.0]])
    last = inputs(1, uniform=1 - 2**-24)
    assert draw(logits, last.temperature, last.uniform).tolist() == [1]


def test_a_compiler_sees_the_kv_written_in_place_and_no_sort():
    """The graph after torch's own passes, which is what a vendor's compiler is given: the caches
    are inputs that are copied into, by no way round through a view.
    """
    host = host_batch([(5, 1), (2, 1)], Q=1, width=3, phase="decode")
    batch = step_batch(host, signed_inputs(host, BLOCK_SIZE))
    k, v = torch.zeros(2, BLOCKS * BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    layer = KVLayer(k=k, v=v, block_size=BLOCK_SIZE)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph.graph)
        return graph.forward

    def step(q, k, v, logits, rules):
        out = PagedAttention()(q, k, v, layer, batch, scale=1.0)
        return out, draw_filtered(logits, *rules)

    q, k = torch.ones(2, 4, HEAD_DIM), torch.ones(2, KV_HEADS, HEAD_DIM)
    rules = [torch.ones(2), torch.zeros(2), torch.ones(2, dtype=torch.int32), *torch.ones(2, 2)]
    backend = aot_autograd(fw_compiler=compiler, keep_inference_input_mutations=True)
    with torch.inference_mode():
        torch.compile(step, backend=backend, fullgraph=True, dynamic=False)(
            q, k, k, torch.ones(2, 9), rules
        )
    (graph,) = graphs
    calls = [node for node in graph.nodes if node.op == "call_function"]
    written = [node.args[0] for node in calls if node.target is torch.ops.aten.copy_.default]
    assert [node.op for node in written] == ["placeholder", "placeholder"]
    names = {str(node.target) for node in calls}
    assert "aten.index_copy.default" in names
    assert not {n for n in names if "sort" in n or "nonzero" in n or "as_strided" in n}
    assert not {n for n in names if "scatter" in n}
    assert layer.k.any()
