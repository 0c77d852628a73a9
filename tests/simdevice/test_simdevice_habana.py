"""The habana_frameworks stand-in: fused kernels against plain torch, and what they refuse."""

from __future__ import annotations

import pytest
from simdevice import run_on_device

SCRIPT = """
import importlib.metadata
import os
import torch
from torch.nn import functional as F

import habana_frameworks.torch as ht
import simdevice
from habana_frameworks.torch.hpex.kernels import (
    FusedSDPA, RotaryPosEmbeddingHelperV2, RotaryPosEmbeddingMode, apply_rotary_pos_emb,
)
from habana_frameworks.torch.hpex.normalization import FusedRMSNorm
from habana_frameworks.torch.utils.experimental import _get_device_type, synDeviceType
from habana_frameworks.torch.utils.internal import is_lazy

device, found = simdevice.current(), {}
torch.manual_seed(0)


def refusal(call):
    try:
        call()
    except simdevice.VendorRefuses as error:
        return str(error)
    return None


def close(got, wanted, atol=1e-5):
    return bool(torch.allclose(got.cpu().float(), wanted.float(), atol=atol, rtol=0))


q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
dq, dk, dv = (t.to("hpu") for t in (q, k, v))
K, V = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
mask = torch.rand(2, 1, 5, 5) > 0.3
mask[..., 0] = True
bias = torch.zeros(2, 1, 5, 5).masked_fill(~mask, float("-inf"))
lengths = torch.tensor([5, 3], dtype=torch.int32)
live = torch.arange(5)[None] < lengths[:, None]
both = live[:, None, None] & torch.ones(5, 5, dtype=torch.bool).tril()
wanted = F.scaled_dot_product_attention(q, K, V, both).masked_fill(~live[:, None, :, None], 0)
window = torch.ones(5, 5, dtype=torch.bool).tril() & ~torch.ones(5, 5, dtype=torch.bool).tril(-3)
sinks = torch.randn(4)
scores = torch.cat([q @ K.mT * 8**-0.5, sinks.view(1, 4, 1, 1).expand(2, 4, 5, 1)], -1)
found["sdpa"] = {
    "causal": close(FusedSDPA.apply(dq, dk, dv, None, 0.0, True, None, "fast", True),
                    F.scaled_dot_product_attention(q, K, V, is_causal=True)),
    "bool": close(FusedSDPA.apply(dq, dk, dv, mask.to("hpu"), 0.0, False, 0.5),
                  F.scaled_dot_product_attention(q, K, V, mask, scale=0.5)),
    "bias": close(FusedSDPA.apply(dq, dk, dv, bias.to("hpu"), 0.0, False),
                  F.scaled_dot_product_attention(q, K, V, bias)),
    "lengths": close(FusedSDPA.apply(dq, dk, dv, None, 0.0, True, None, "fp32", True,
                                     lengths.to("hpu"), "right"), wanted),
    "window": close(FusedSDPA.apply(dq, dk, dv, None, 0.0, True, None, "fast", True, None,
                                    "right", False, False, (2, 0)),
                    F.scaled_dot_product_attention(q, K, V, window)),
    "sinks": close(FusedSDPA.apply(dq, dk, dv, None, 0.0, False, None, "fast", True, None,
                                   "right", False, False, (-1, -1), sinks.to("hpu")),
                   scores.softmax(-1)[..., :-1] @ V),
}
found["sdpa_refused"] = [
    refusal(lambda: FusedSDPA.apply(dq, dk, dv, mask.to("hpu"), 0.0, True)),
    refusal(lambda: FusedSDPA.apply(dq, dk.bfloat16(), dv, None)),
    refusal(lambda: FusedSDPA.apply(dq[0], dk[0], dv[0], None)),
    refusal(lambda: FusedSDPA.apply(dq[:, :3], dk, dv, None)),
    refusal(lambda: FusedSDPA.apply(dq[:, :, :2], dk, dv, None, 0.0, True)),
    refusal(lambda: FusedSDPA.apply(dq, dk, dv, None, 0.1)),
    refusal(lambda: FusedSDPA.apply(dq, dk, dv, None, 0.0, False, None, "quick")),
]

x, w = torch.randn(2, 3, 8), torch.randn(8)
dx, dw = x.to("hpu"), w.to("hpu")
found["norm"] = close(FusedRMSNorm.apply(dx, dw, 1e-5), F.rms_norm(x, (8,), w, 1e-5))
found["norm_bf16"] = str(FusedRMSNorm.apply(dx.bfloat16(), dw.bfloat16(), 1e-5).dtype)
found["norm_refused"] = [
    refusal(lambda: FusedRMSNorm.apply(dx, dw.bfloat16(), 1e-5)),
    refusal(lambda: FusedRMSNorm.apply(dx[0], dw, 1e-5)),
    refusal(lambda: FusedRMSNorm.apply(dx, dw[:4], 1e-5)),
]

angle = torch.randn(10, 4)
turned = torch.view_as_complex(torch.stack(q.chunk(2, -1), -1)) * torch.polar(
    torch.ones(5, 4), angle[:5])
blockwise = torch.cat([turned.real, turned.imag], -1)
cos, sin = (torch.cat([f(angle)] * 2, -1).to("hpu") for f in (torch.cos, torch.sin))
pairs = torch.view_as_complex(q.view(2, 4, 5, 4, 2)) * torch.polar(torch.ones(5, 4), angle[:5])
pcos, psin = (f(angle[:5]).repeat_interleave(2, -1).to("hpu") for f in (torch.cos, torch.sin))
positions = torch.arange(5).expand(2, 5).to("hpu")
found["rotary"] = [
    close(apply_rotary_pos_emb(dq, cos[:5], sin[:5], None, 0, RotaryPosEmbeddingMode.BLOCKWISE),
          blockwise),
    close(apply_rotary_pos_emb(dq, pcos, psin, None, 0, RotaryPosEmbeddingMode.PAIRWISE),
          torch.view_as_real(pairs).flatten(-2)),
    close(apply_rotary_pos_emb(dq, cos, sin, positions), blockwise),
    close(RotaryPosEmbeddingHelperV2.apply(dq, cos[None, None], sin[None, None], positions),
          blockwise),
]
found["rotary_refused"] = refusal(lambda: apply_rotary_pos_emb(dq.bfloat16(), cos[:5], sin[:5]))

a, b = torch.randn(3, 8), torch.randn(6, 8)
to_fp8 = torch.ops.hpu.cast_to_fp8_v2
large, amax = to_fp8(torch.tensor([500.0, -1000.0, 100.0]).to("hpu"), None, False, True,
                     torch.float8_e4m3fn)
found["fp8_range"] = [large.float().cpu().tolist(), amax.item()]
unscaled = torch.tensor([[300.0, 1.0]]).to("hpu").to(torch.float8_e4m3fn)
found["fp8_too_large"] = torch.ops.hpu.cast_from_fp8(unscaled, None, torch.float32).cpu()[
    0].nan_to_num(-1).tolist()
scale_a, scale_b = torch.tensor([[2.0]] * 3).to("hpu"), torch.arange(1.0, 7.0).to("hpu")
fa = to_fp8(a.to("hpu"), 1 / scale_a, False, False, torch.float8_e4m3fn)[0]
fb = to_fp8(b.to("hpu"), (1 / scale_b)[:, None], False, False, torch.float8_e4m3fn)[0]
product = torch.ops.hpu.fp8_gemm_v2(
    A=fa, trans_A=False, B=fb, trans_B=True, D=None, out_dtype=torch.float32,
    A_scale_inv=scale_a, B_scale_inv=scale_b, bias=None, accumulate=False)
exact = (fa.cpu().float() * 2) @ (fb.cpu().float() * torch.arange(1.0, 7.0)[:, None]).mT
found["fp8_gemm"] = [close(product, exact, 1e-4), close(product, a @ b.mT, 1.0)]

w12, w3 = [torch.randn(12, 8) for _ in range(4)], [torch.randn(8, 6) for _ in range(4)]
ids, gates = torch.tensor([[0, 3], [2, 1], [3, 2]]), torch.rand(3, 2)
def experts(low, high):
    out = torch.zeros(3, 8)
    for t in range(3):
        for j in range(2):
            e = int(ids[t, j])
            if low <= e <= high:
                gate, up = (w12[e] @ a[t]).chunk(2)
                out[t] += gates[t, j] * (w3[e] @ (F.silu(gate) * up))
    return out
def moe(low, high, **options):
    return torch.ops.hpu.mixture_of_experts(
        hidden_states=a.to("hpu"), expert_routing_table=ids.to("hpu"),
        router_weights=gates.to("hpu"), w12=[t.to("hpu") for t in w12[low:high + 1]],
        w3=[t.to("hpu") for t in w3[low:high + 1]], permuted_weights=True, activation="silu",
        experts_min=low, experts_max=options.get("last", high))
found["moe"] = [close(moe(0, 3), experts(0, 3), 1e-4), close(moe(1, 2), experts(1, 2), 1e-4)]
found["moe_refused"] = refusal(lambda: moe(0, 2, last=3))

# flat paged attention by blocks gives the same as attention over the whole
keys = torch.randn(2, 3, 4, 8)
query = torch.randn(2, 8)
groups = torch.tensor([0, 0, 1, 1, 0, 1, -1])
blocks = torch.cat([keys[0, :2], keys[1, :2], keys[0, 2:], keys[1, 2:], torch.randn(1, 4, 8)])
attn = torch.einsum("bd,bsd->bs", query[groups.clamp(0)], blocks)[:, None, None, None]
weights, top, total = torch.ops.hpu.block_softmax(
    attn.to("hpu"), torch.zeros(7, 4, device="hpu"), groups.to("hpu"))
fix = torch.ops.hpu.block_softmax_adjustment(top, total, groups.to("hpu"), 2, [7, 1, 1, 1])
part = torch.einsum("bs,bsd->bd", (weights * fix).cpu()[:, 0, 0, 0], blocks)
summed = torch.zeros(2, 8).index_add_(0, groups[:6], part[:6])
whole = torch.stack([(query[i] @ keys[i].flatten(0, 1).mT).softmax(-1) @ keys[i].flatten(0, 1)
                     for i in range(2)])
found["blocks"] = [close(summed, whole, 1e-4), part[6].abs().max().item()]

nibbles = torch.randint(0, 16, (4, 16))
packed = (nibbles.view(4, 2, 8) << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
scales, zeros = torch.rand(2, 16), torch.randint(0, 16, (2, 16))
packed_zeros = (zeros.view(2, 2, 8) << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
found["uint4"] = close(
    torch.ops.hpu.convert_from_uint4(
        packed.to("hpu"), scales.to("hpu"), packed_zeros.to("hpu"), torch.float32),
    (nibbles - zeros.repeat_interleave(2, 0)) * scales.repeat_interleave(2, 0))

fused = torch.compile(
    lambda x, w, q, k, v: (
        FusedRMSNorm.apply(x, w, 1e-5), FusedSDPA.apply(q, k, v, None, 0.0, True)),
    backend="hpu_backend", fullgraph=True, dynamic=False)
with torch.inference_mode():
    normed, attended = fused(dx, dw, dq, dk, dv)
found["compiled"] = [close(normed, F.rms_norm(x, (8,), w, 1e-5)),
                     close(attended, F.scaled_dot_product_attention(q, K, V, is_causal=True))]
found["facts"] = [importlib.metadata.version("habana-torch-plugin").count("."), is_lazy(),
                  _get_device_type() is synDeviceType.synDeviceGaudi2, torch.hpu.get_device_name()]
simdevice.report(found)
"""
RANKS = """
import json, os, sys, tempfile
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank, folder):
    import habana_frameworks.torch.distributed.hccl
    from habana_frameworks.torch.hpu import HPUGraph, graph

    dist.init_process_group("hccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = torch.full((4,), float(rank + 1), device="hpu")
    dist.all_reduce(x)
    gathered = torch.empty(4, device="hpu")
    dist.all_gather_into_tensor(gathered, torch.full((2,), float(rank), device="hpu"))
    scattered = torch.empty(2, device="hpu")
    dist.reduce_scatter_tensor(scattered, torch.arange(4.0, device="hpu"))
    host = torch.ones(2)
    dist.all_reduce(host)
    y, captured = torch.zeros(2, device="hpu"), HPUGraph()
    with graph(captured):
        z = y * 2
        dist.all_reduce(z)
    y.fill_(rank + 1.0)
    captured.replay()
    found = [t.tolist() for t in (x, gathered, scattered, host, z)]
    if rank == 0:
        with open(os.environ["SIMDEVICE_REPORT"], "w") as file:
            json.dump(found, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder,), 2, start_method="spawn")
"""


@pytest.fixture(scope="module")
def found():
    """What the script saw."""
    return run_on_device("hpu", SCRIPT, memory=1 << 26).value


def test_fused_attention_is_attention(found):
    assert all(found["sdpa"].values()), found["sdpa"]


def test_fused_attention_refuses_what_is_never_given_to_it(found):
    words = ["together with a mask", "takes one dtype", "4 dimensions", "3 query heads",
             "is ambiguous", "dropout 0.1", "softmax mode 'quick'"]  # fmt: skip
    for word, text in zip(words, found["sdpa_refused"], strict=True):
        assert text is not None and word in text, word


def test_fused_norm(found):
    assert found["norm"] is True
    assert found["norm_bf16"] == "torch.bfloat16"
    for word, text in zip(["one dtype", "3 dimensions", "weight (4,)"], found["norm_refused"],
                          strict=True):  # fmt: skip
        assert word in text


def test_rotary_in_both_pairings_and_by_positions(found):
    assert found["rotary"] == [True] * 4
    assert "takes one dtype" in found["rotary_refused"]


def test_fp8_ends_at_240_on_gaudi_2(found):
    assert found["fp8_range"] == [[240.0, -240.0, 96.0], 1000.0]
    assert found["fp8_too_large"] == [-1.0, 1.0]
    assert found["fp8_gemm"] == [True, True]


def test_experts_within_the_range_are_summed(found):
    assert found["moe"] == [True, True]
    assert "3 and 3 weights for experts 0 to 3" in found["moe_refused"]


def test_block_softmax_over_groups_is_softmax_over_the_whole(found):
    equal, padding = found["blocks"]
    assert equal is True
    assert padding == 0.0


def test_uint4_unpacks(found):
    assert found["uint4"] is True


def test_fused_kernels_are_held_by_a_program(found):
    assert found["compiled"] == [True, True]


def test_facts_of_the_stand_in(found):
    assert found["facts"] == [2, False, True, "GAUDI2"]


def test_hccl_between_two_processes_and_in_a_graph():
    run = run_on_device("hpu", RANKS, memory=1 << 26, env={"PT_HPU_LAZY_MODE": "1"})
    reduced, gathered, scattered, host, replayed = run.value
    assert reduced == [3.0] * 4
    assert gathered == [0.0, 0.0, 1.0, 1.0]
    assert scattered == [0.0, 2.0]
    assert host == [2.0, 2.0]
    assert replayed == [6.0, 6.0]
