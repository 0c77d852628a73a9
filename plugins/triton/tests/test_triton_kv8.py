"""Attention with sinks, and over a KV of eight bits with scales, against the reference op."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from triton_host import HostBackend
from triton_launches import long_decode

from tokenry.backend.reference import REFERENCE_OPS
from tokenry.conformance.compare import difference
from tokenry.conformance.paged import AttentionCase, Paged
from tokenry_triton.attention import write_kv
from tokenry_triton.gpu.ops import Attention as TorchAttention
from tokenry_triton.ops import triton_ops

MIXED = ((0, 17), (16, 1), (15, 3))
DECODE = ((15, 1), (53, 1))
SINKS = torch.tensor([2.5, -1.0, 0.0, 7.0])


def rows(op, case):
    """What an op with sinks gives for a case."""
    paged = Paged(HostBackend(), case)
    paged.op = partial(op, sinks=SINKS.to(paged.dtype))
    return paged.run()


@pytest.mark.parametrize("works", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    ("dtype", "rule"),
    [("float32", {}), ("bfloat16", {"window": 5}), ("float16", {"softcap": 2.0})],
)
def test_a_sink_takes_its_share_of_each_head(works, dtype, rule):
    case = AttentionCase(works=works, dtype=dtype, spare=True, **rule)
    want = rows(REFERENCE_OPS["attention"], AttentionCase(works=works, spare=True, **rule))
    for op in (triton_ops("sm_90")["attention"], TorchAttention()):
        got = rows(op, case)
        assert difference(got.got[0], want.got[0], dtype) is None
        assert abs(got.got[0] - got.want[0]).max() > 0.05  # without sinks it is another answer


def test_a_split_decode_has_its_sink_once():
    launch, sinks = long_decode((600, 5, 1300)), torch.tensor([1.5, 6.0])
    got = triton_ops("sm_90")["attention"](*launch, scale=0.3, sinks=sinks)
    want = REFERENCE_OPS["attention"](*launch, scale=0.3, sinks=sinks)
    assert difference(got.numpy(), want.double().numpy(), "float32") is None
    alone = triton_ops("sm_90")["attention"](*long_decode((600,)), scale=0.3, sinks=sinks)
    assert torch.equal(alone[0], got[0])


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e4m3fnuz"])
@pytest.mark.parametrize("lengths", [(20, 5), (600, 20)], ids=["whole", "split"])
def test_eight_bits_with_scales_are_the_values_that_they_stand_for(kind, lengths):
    q, k, v, kv, batch = long_decode(lengths)
    scales = torch.tensor([[0.03], [0.2]])
    wide = kv * scales[:, None, None, :, None] / 4
    small = (wide / scales[:, None, None, :, None]).to(getattr(torch, kind))
    got = triton_ops("sm_90")["attention"](
        q, k, v, small, batch, scale=0.3, window=64, kv_scales=scales
    )
    held = small.float() * scales[:, None, None, :, None]
    new = [held[i].flatten(0, 1)[batch.slots.long()] for i in (0, 1)]
    want = REFERENCE_OPS["attention"](q, *new, held, batch, scale=0.3, window=64)
    assert difference(got.numpy(), want.double().numpy(), "float32") is None
    assert (new[1] - v).abs().max() < 0.15
    assert (new[1] - v).abs().max() > 0


@pytest.mark.parametrize(("kind", "most"), [("float8_e4m3fn", 448), ("float8_e4m3fnuz", 240)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_eight_bits_cannot_hold_saturates(kind, most, dtype):
    kv = torch.zeros(2, 2, 4, 1, 4).to(getattr(torch, kind))
    given = torch.tensor([1e4, -1e4, 0.3, -0.0]).view(1, 1, 4).to(dtype)
    write_kv(given, given, kv, torch.tensor([5], dtype=torch.int32))
    want = torch.tensor([most, -most, 0.3125, 0.0])
    assert torch.equal(kv[0, 1, 1, 0].float(), want)
    assert torch.equal(kv[1, 1, 1, 0].float(), want)
