"""Simulators compute like the reference and forbid what their kind of device forbids."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch

from tokenry.backend.base import SampleInputs, StepBatch
from tokenry.backend.contract import Bucket, DeviceRef, HostBatch, KVSpec
from tokenry.backend.ops import OpTable
from tokenry.backend.reference import REFERENCE_OPS
from tokenry.backend.simulators import SIMULATORS, open_simulator
from tokenry.errors import BackendError, ConfigError, DeviceOOM, UncoveredShape

SPEC = KVSpec(num_layers=1, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32")
VOCAB, HEADS, WIDTH = 11, 4, 6


class ToyModel:
    """One attention layer; `peek` reads a value in the step, as a careless model would."""

    architecture, config, dtype, vocab_size, max_model_len = "Toy", {}, "float32", VOCAB, 96

    def __init__(self, peek=None, **rule):
        self.peek, self.rule = peek, rule

    def torch_step(self, weights, ops, caps):
        named = dict(weights)
        attention = ops.resolve("attention")

        def step(batch, kv):
            x = named["embed"][batch.token_ids.long()]
            q, k, v = (x @ named[n] for n in ("q", "k", "v"))
            rows = len(x)
            y = attention(
                q.view(rows, HEADS, 8), k.view(rows, 2, 8), v.view(rows, 2, 8),
                kv[0], batch, scale=0.3, **{"window": None, "softcap": None, **self.rule},
            )  # fmt: skip
            if self.peek is not None:
                self.peek(batch, kv)
            return (y @ named["out"])[batch.logit_rows.long()]

        return step


def weights():
    g = torch.Generator().manual_seed(0)
    shapes = {"embed": (VOCAB, 12), "q": (12, 32), "k": (12, 16), "v": (12, 16), "out": (32, VOCAB)}
    return [(name, torch.randn(shape, generator=g)) for name, shape in shapes.items()]


def opened(name, memory=10**6):
    return open_simulator(
        DeviceRef(backend=name, index=0, name="simulator", score=0), {"memory": str(memory)}
    )


def build(device, **model):
    return device.build_model(ToyModel(**model), weights(), OpTable(device.ops()))


def host_batch(phase, rows, *, seqs, q, kv_blocks=0):
    """rows: (tokens, cached, blocks); uniform rows of q tokens, padded to seqs."""
    T = seqs * q
    ints = {n: np.zeros(T, np.int32) for n in ("token_ids", "positions", "slots", "prev_row")}
    table = np.zeros((seqs, WIDTH), np.int32)
    q_lens, seq_lens, logit_rows = (np.zeros(seqs, np.int32) for _ in range(3))
    for i, (tokens, cached, blocks) in enumerate(rows):
        n, at = len(tokens), i * q
        p = cached + np.arange(n)
        ints["token_ids"][at : at + n], ints["positions"][at : at + n] = tokens, p
        ints["slots"][at : at + n] = np.array(blocks)[p // 16] * 16 + p % 16
        table[i, : len(blocks)] = blocks
        q_lens[i], seq_lens[i], logit_rows[i] = n, cached + n, at + n - 1
    return HostBatch(
        bucket=Bucket(phase, seqs, T, kv_blocks),
        q_start=np.arange(seqs + 1, dtype=np.int32) * q,
        q_lens=q_lens, seq_lens=seq_lens, logit_rows=logit_rows, block_table=table, **ints,
    )  # fmt: skip


def on_device(device, host):
    fields = {f.name: getattr(host, f.name) for f in dataclasses.fields(StepBatch)}
    tensors = {
        n: torch.from_numpy(a.copy()) for n, a in fields.items() if n not in ("bucket", "extra")
    }
    extra = {n: torch.from_numpy(a) for n, a in device.attn_inputs(host).items()}
    return StepBatch(bucket=host.bucket, extra=extra, **tensors)


def prefill(tokens, blocks):
    return host_batch("prefill", [(tokens, 0, blocks)], seqs=1, q=48, kv_blocks=4)


def decode(*rows):
    return host_batch("decode", rows, seqs=4, q=1, kv_blocks=8)


PROMPTS = ((list(range(10)) * 4, [3, 1, 7]), ([5, 2, 8], [2]))
STEP = decode(([4], 40, [3, 1, 7]), ([9], 3, [2]))


def logits(device, step, compiled):
    """Two prompts one by one, then both in one decode step; as programs if `compiled`."""
    kv = device.alloc_kv(SPEC, 9)
    results = []
    for host in (*(prefill(*prompt) for prompt in PROMPTS), STEP):
        batch = on_device(device, host)

        def program(b):
            return step(b, kv)

        run = device.compile(program, batch) if compiled else program
        results += [run(batch)[: len(PROMPTS) if host is STEP else 1]]
    return np.concatenate(device.fetch(results)())


@pytest.mark.parametrize("rule", [{}, {"window": 20}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("name", SIMULATORS)
def test_every_simulator_computes_what_the_reference_computes(name, rule):
    plain = opened("sim-cuda")
    want = logits(plain, build(plain, **rule), compiled=False)
    device = opened(name)
    got = logits(device, build(device, **rule), compiled=device.caps.graphs != "none")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.isfinite(got).all() and np.abs(want).max() > 0.01


@pytest.mark.parametrize("name", SIMULATORS)
def test_memory_is_counted_exactly_and_its_end_is_typed(name):
    device = opened(name)
    build(device)
    weight_bytes = sum(t.nbytes for _, t in weights())
    assert device.memory().used == weight_bytes
    kv = device.alloc_kv(SPEC, 9)
    assert device.memory().used == weight_bytes + 9 * SPEC.block_bytes
    with pytest.raises(DeviceOOM):
        device.alloc_kv(SPEC, 10**6)
    del kv
    gc.collect()
    assert device.memory().free == 10**6 - weight_bytes
    with pytest.raises(DeviceOOM, match="Weight embed"):
        build(opened(name, memory=100))


@pytest.mark.parametrize("name", SIMULATORS)
@pytest.mark.parametrize(
    "peek",
    [
        lambda b, kv: b.seq_lens.max().item(),
        lambda b, kv: b.seq_lens.tolist(),
        lambda b, kv: bool(b.positions[0] > 3),
        lambda b, kv: int(b.q_lens[0]),
        lambda b, kv: b.slots.nonzero(),
        lambda b, kv: kv[0].numpy(),
    ],
    ids=["item", "tolist", "bool", "int", "nonzero", "numpy"],
)
def test_a_step_that_reads_a_value_is_refused(name, peek):
    device = opened(name)
    step, kv = build(device, peek=peek), device.alloc_kv(SPEC, 9)
    with pytest.raises(BackendError, match="inside a step"):
        step(on_device(device, prefill(*PROMPTS[0])), kv)


@pytest.mark.parametrize("text", ["", "lots", "-5"])
def test_a_memory_option_that_is_no_number_is_refused(text):
    with pytest.raises(ConfigError, match="not a number of bytes"):
        open_simulator(DeviceRef(backend="sim-cuda", index=0, name="", score=0), {"memory": text})


# ---- capture and replay --------------------------------------------------------------------------


def captured(**model):
    device = opened("sim-cuda")
    step, kv = build(device, **model), device.alloc_kv(SPEC, 9)
    return device, step, kv, lambda b: step(b, kv)


def test_a_replay_takes_new_values_and_overwrites_its_one_output():
    device, _, _, program = captured()
    replay = device.compile(program, on_device(device, STEP))
    other = on_device(device, decode(([1], 2, [5])))
    first = replay(on_device(device, STEP))
    kept = first.clone()
    second = replay(other)
    assert second.data_ptr() == first.data_ptr() and not torch.equal(first, kept)
    torch.testing.assert_close(second, program(other))
    assert device.compile_count() == 1


def test_a_replay_with_another_shape_is_refused():
    device, _, _, program = captured()
    batch = on_device(device, STEP)
    replay = device.compile(program, batch)
    with pytest.raises(BackendError, match="block_table was recorded as"):
        replay(dataclasses.replace(batch, block_table=batch.block_table[:, :3]))
    with pytest.raises(BackendError, match="was given"):
        replay(on_device(device, prefill(*PROMPTS[0])))


def test_a_recording_that_allocates_kv_is_refused():
    device = opened("sim-cuda")
    step = build(device, peek=lambda b, kv: device.alloc_kv(SPEC, 1))
    kv = device.alloc_kv(SPEC, 9)
    with pytest.raises(BackendError, match="allocated while"):
        device.compile(lambda b: step(b, kv), on_device(device, STEP))


def test_a_replay_whose_kv_was_freed_is_refused():
    device = opened("sim-cuda")
    step, batch = build(device), on_device(device, STEP)
    held = [device.alloc_kv(SPEC, 9)]
    replay = device.compile(lambda b: step(b, held[0]), batch)
    held[0] = device.alloc_kv(SPEC, 9)
    gc.collect()
    with pytest.raises(BackendError, match="has been freed"):
        replay(batch)


# ---- static devices -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sim-hpu", "sim-neuron"])
def test_a_shape_that_was_not_compiled_is_refused_and_counts_stay(name):
    device = opened(name)
    step, kv = build(device), device.alloc_kv(SPEC, 9)
    program = device.compile(lambda b: step(b, kv), on_device(device, STEP))
    program(on_device(device, decode(([1], 2, [5]))))
    assert device.compile_count() == 1
    wider = on_device(device, prefill(*PROMPTS[0]))
    with pytest.raises(UncoveredShape, match="was given"):
        program(wider)
    with pytest.raises(UncoveredShape, match="not compiled before service"):
        step(wider, kv)
    assert device.compile_count() == 1


def test_more_blocks_than_the_bucket_holds_are_refused():
    device = opened("sim-hpu")
    host = host_batch("decode", [([1], 40, [3, 1, 7])], seqs=1, q=1, kv_blocks=2)
    with pytest.raises(UncoveredShape, match="holds 3 blocks"):
        device.attn_inputs(host)


def test_the_baked_device_plans_by_formula_and_keeps_its_kv():
    device = opened("sim-neuron")
    plan = device.plan_kv(SPEC, 500_000, None)
    build(device)
    assert device.plan_kv(SPEC, 500_000, None) == plan and plan.num_blocks > 0
    assert sum(plan.ledger.values()) == 500_000
    with pytest.raises(BackendError, match="planned before"):
        device.compile(lambda b: b.token_ids, on_device(device, STEP))
    kv = device.alloc_kv(SPEC, 9)
    device.compile(lambda b: kv[0], on_device(device, STEP))
    with pytest.raises(BackendError, match="compiled for 9"):
        device.alloc_kv(SPEC, 10)


# ---- opaque -------------------------------------------------------------------------------------


def test_opaque_results_come_to_the_host_by_fetch_alone():
    device = opened("sim-opaque")
    step, kv = build(device), device.alloc_kv(SPEC, 9)
    result = step(on_device(device, prefill(*PROMPTS[0])), kv)
    for read in (result.numpy, result.tolist, result.data_ptr, result[0, 0].item):
        with pytest.raises(BackendError):
            read()
    with pytest.raises(BackendError):
        bool(result.argmax() == 1)
    number = torch.ones(1)
    inputs = SampleInputs(
        temperature=number, top_k=number.int(), top_p=number, min_p=number * 0, uniform=number / 2
    )
    (ids,) = device.fetch([REFERENCE_OPS["sample"](result, inputs)])()
    (values,) = device.fetch([result])()
    assert ids.tolist() == [int(values.argmax())]
    assert "OpaqueTensor" in repr(result)
