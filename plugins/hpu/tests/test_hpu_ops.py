"""Kernels on the simulated device against the reference ops on the host."""

from __future__ import annotations

import pytest
from simdevice import run_on_device

SCRIPT = """
import itertools, math, os
import numpy as np
import simdevice
import torch
from tokenry.backend import reference
from tokenry.backend.base import StepBatch
from tokenry.backend.contract import Bucket, HostBatch
from tokenry_hpu.ops import KVLayer, flat_blocks, hpu_ops
from tokenry_hpu.vendor import load

vendor = load(os.environ, lazy=False)
ops = hpu_ops(vendor, None)
BLOCK, BLOCKS, NAN = 16, 48, math.nan
found = {}

def host_batch(phase, lens, news, rows, q, kv_blocks):
    rng = np.random.default_rng(len(lens) + q)
    free = iter(1 + rng.permutation(BLOCKS - 1))
    T, table = rows * q, np.zeros((rows, 8), np.int32)
    positions, slots = np.zeros(T, np.int32), np.zeros(T, np.int32)
    for i, (length, new) in enumerate(zip(lens, news)):
        count = -(-length // BLOCK)
        table[i, :count] = [next(free) for _ in range(count)]
        at = np.arange(length - new, length)
        positions[i * q : i * q + new] = at
        slots[i * q : i * q + new] = table[i, at // BLOCK] * BLOCK + at % BLOCK
    pad = lambda values: np.array([*values, *[0] * (rows - len(values))], np.int32)
    return HostBatch(
        bucket=Bucket(phase, rows, T, kv_blocks), token_ids=np.zeros(T, np.int32),
        positions=positions, slots=slots, q_start=np.arange(rows + 1, dtype=np.int32) * q,
        q_lens=pad(news), seq_lens=pad(lens), block_table=table,
        logit_rows=np.zeros(rows, np.int32), prev_row=np.full(T, -1, np.int32))

def step_batch(host, device):
    names = ("token_ids", "positions", "slots", "q_start", "q_lens", "seq_lens", "block_table",
             "logit_rows")
    put = lambda a: torch.from_numpy(np.ascontiguousarray(a)).to(device)
    extra = {k: put(v) for k, v in flat_blocks(host, BLOCK).items()}
    return StepBatch(bucket=host.bucket, extra=extra, **{n: put(getattr(host, n)) for n in names})

def attention(phase, lens, news, rows, q, kv_blocks, dtype, window, softcap, H, KH, broken=None):
    torch.manual_seed(1)
    host = host_batch(phase, lens, news, rows, q, kv_blocks)
    kv = torch.randn(2, BLOCKS, BLOCK, KH, 16).to(dtype)
    for i, length in enumerate(lens):  # what was there before the request is no number
        kv[:, host.block_table[i, (length - 1) // BLOCK], (length - 1) % BLOCK + 1 :] = NAN
    kv[:, 0] = NAN
    if broken is not None:
        kv[:, host.block_table[broken, 0]] = NAN
    mine = KVLayer(*(kv[i].flatten(0, 1).to("hpu") for i in (0, 1)), BLOCK)
    T = host.bucket.tokens
    q_, k, v = (torch.randn(T, heads, 16).to(dtype) for heads in (H, KH, KH))
    rule = dict(scale=0.3, window=window, softcap=softcap)
    want = reference.Attention()(q_, k, v, kv, step_batch(host, "cpu"), **rule)
    before = simdevice.current().counts()
    batch = step_batch(host, "hpu")
    on = [x.to("hpu") for x in (q_, k, v)]
    with simdevice.current().no_host_sync():
        out = ops["attention"](*on, mine, batch, **rule)
    live = np.concatenate([np.arange(i * q, i * q + new) for i, new in enumerate(news)])
    same = all(
        torch.equal(kv[i].flatten(0, 1)[BLOCK:].nan_to_num(), mine[i].cpu()[BLOCK:].nan_to_num())
        for i in (0, 1))
    rest = [row for row in range(T) if row not in set(live.tolist())]
    return want, out.cpu(), live, same, rest

def worst(a, b):
    return (a.float() - b.float()).abs().max().item()

shapes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
for (name, dtype), window, softcap in itertools.product(shapes.items(), (None, 20), (None, 4.0)):
    for phase, lens, news, rows, q, kv in (
        ("decode", [1, 16, 17, 50], [1, 1, 1, 1], 6, 1, 16),
        ("decode", [128], [1], 1, 1, 8),
        ("prefill", [50], [33], 1, 48, 6),
        ("prefill", [33], [33], 1, 48, 3),
        ("prefill", [1], [1], 1, 16, 1),
    ):
        want, out, live, same, rest = attention(
            phase, lens, news, rows, q, kv, dtype, window, softcap, 6, 2)
        key = f"attention {name} {phase} {lens} window={window} softcap={softcap}"
        ok = bool(torch.isfinite(out).all()) and same
        found[key] = worst(want[live], out[live]) if ok else "not finite, or the cache differs"

want, out, live, same, rest = attention(
    "decode", [20, 16, 17], [1, 1, 1], 4, 1, 8, torch.float32, None, None, 4, 4, broken=1)
found["broken row is its own"] = [bool(torch.isfinite(out[i]).all()) for i in range(4)]
found["its neighbours"] = max(worst(want[i], out[i]) for i in (0, 2))

for name, dtype in shapes.items():
    torch.manual_seed(2)
    x, r = torch.randn(5, 48).to(dtype), torch.randn(5, 48).to(dtype)
    for weight_type in (dtype, torch.float32):
        w = 1 + 0.1 * torch.randn(48).to(weight_type)
        for residual in (None, r):
            args = [x, w, 1e-5] + ([] if residual is None else [residual])
            want = reference.RmsNorm()(*args)
            got = ops["rms_norm"](*(a.to("hpu") if torch.is_tensor(a) else a for a in args))
            pairs = [(want, got)] if residual is None else list(zip(want, got))
            found[f"rms_norm {name} {weight_type} {residual is not None}"] = max(
                worst(a, b.cpu()) for a, b in pairs)
    heads = torch.randn(5, 3, 16).to(dtype)
    found[f"rms_norm {name} heads"] = worst(
        reference.RmsNorm()(heads, torch.ones(16).to(dtype), 1e-6),
        ops["rms_norm"](heads.to("hpu"), torch.ones(16).to(dtype).to("hpu"), 1e-6).cpu())
    for rot in (16, 8):
        q_, k = torch.randn(5, 4, 16).to(dtype), torch.randn(5, 2, 16).to(dtype)
        angle = torch.randn(32, rot // 2)
        table = torch.stack((angle.cos(), angle.sin()), 1)
        at = torch.tensor([0, 3, 3, 31, 7], dtype=torch.int32)
        want = reference.Rope()(q_, k, at, table)
        got = ops["rope"](*(t.to("hpu") for t in (q_, k, at, table)))
        found[f"rope {name} {rot}"] = max(worst(a, b.cpu()) for a, b in zip(want, got))
    for bias in ({}, {"bias": torch.randn(300).to(dtype)}):
        weights = {"weight": 0.1 * torch.randn(300, 48).to(dtype), **bias}
        on = {n: t.to("hpu") for n, t in weights.items()}
        want = reference.Linear()(x, weights)
        op = ops["linear"]
        found[f"linear {name} {len(bias)}"] = worst(want, op(x.to("hpu"), op.pack(on)).cpu())
        for top in (240.0, 448.0) if name == "bfloat16" else ():
            if top > (240.0 if os.environ.get("SIMDEVICE_GAUDI", "2") == "2" else 448.0):
                continue
            op = hpu_ops(vendor, top)["linear"]
            packed = op.pack(on)
            got = op(x.to("hpu"), packed).cpu()
            found[f"fp8 {len(bias)}"] = [
                str(packed["fp8"].dtype), (want - got).float().norm().item() / want.norm().item()]
    for kind in ("silu", "gelu", "gelu_tanh"):
        found[f"act_mul {name} {kind}"] = worst(
            reference.ActMul()(x, kind), ops["act_mul"](x.to("hpu"), kind).cpu())
    for renormalize in (True, False):
        raw = {"w13": 0.2 * torch.randn(4, 64, 48).to(dtype),
               "w2": 0.2 * torch.randn(4, 48, 32).to(dtype)}
        logits = torch.randn(5, 4).to(dtype)
        rule = dict(top_k=2, renormalize=renormalize, kind="silu")
        op = ops["moe"]
        packed = op.pack({n: t.to("hpu") for n, t in raw.items()})
        found[f"moe {name} {renormalize}"] = worst(
            reference.Moe()(x, logits, raw, **rule),
            op(x.to("hpu"), logits.to("hpu"), packed, **rule).cpu())
found["moe of another activation"] = ops["moe"].supports(kind="gelu_tanh")
small = hpu_ops(vendor, 240.0)["linear"].pack({"weight": torch.randn(8, 48).to("hpu")})
found["a router stays as it is"] = sorted(small)
simdevice.report(found)
"""
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2}


@pytest.fixture(scope="module", params=["2", "3"], ids=["Gaudi 2", "Gaudi 3"])
def found(request):
    """What every case gave: the largest difference to the reference, or a fact."""
    env = {"PT_HPU_LAZY_MODE": "0", "SIMDEVICE_GAUDI": request.param}
    return run_on_device("hpu", SCRIPT, env=env).value


@pytest.mark.parametrize("op", ["attention", "rms_norm", "rope", "linear", "act_mul", "moe"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_kernels_agree_with_the_reference(found, op, dtype):
    errors = {name: e for name, e in found.items() if name.startswith(f"{op} {dtype}")}
    assert len(errors) >= 2
    wrong = {name: e for name, e in errors.items() if not isinstance(e, float)}
    assert not wrong
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_a_broken_row_stays_alone(found):
    assert found["broken row is its own"] == [True, False, True, True]
    assert found["its neighbours"] < TOLERANCE["float32"]


def test_fp8_uses_the_devices_range(found):
    for bias in (0, 1):
        dtype, error = found[f"fp8 {bias}"]
        assert dtype == "torch.float8_e4m3fn"
        assert 1e-4 < error < 0.05


def test_small_weights_and_other_activations_are_left_alone(found):
    assert found["a router stays as it is"] == ["weight"]
    assert found["moe of another activation"] is False
