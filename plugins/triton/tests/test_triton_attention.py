"""The attention kernels against dense attention in float64, through the conformance kit's cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from triton.runtime.errors import InterpreterError
from triton_host import HostBackend
from triton_launches import long_decode

from tokenry.backend.reference import REFERENCE_OPS
from tokenry.conformance.attention import trial
from tokenry.conformance.compare import difference
from tokenry.conformance.paged import AttentionCase, Paged
from tokenry_triton.attention import write_kv
from tokenry_triton.launch import ARCHS
from tokenry_triton.ops import triton_ops

DECODE = ((15, 1), (16, 1), (53, 1))
MIXED = ((0, 17), (16, 1), (15, 3), (0, 1), (3, 21))
PREFILL = ((0, 2), (0, 35))


def backend(**options):
    return HostBackend(**options)


def assert_right(case, **options):
    assert trial(backend(**options), case) is None


@pytest.mark.parametrize("works", [DECODE, MIXED, PREFILL], ids=["decode", "mixed", "prefill"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_phase_and_dtype(works, dtype):
    assert_right(AttentionCase(works=works, dtype=dtype))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 4, 16), (6, 2, 64), (8, 1, 32), (2, 2, 80), (2, 1, 96), (4, 2, 128), (4, 2, 256)],
)
def test_every_layout_of_heads(heads, kv_heads, dim):
    case = AttentionCase(works=MIXED[:3], num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    assert_right(case)


@pytest.mark.parametrize("works", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(
    ("window", "softcap"), [(1, None), (16, None), (17, 2.0), (640, None), (None, 30.0)]
)
def test_windows_and_soft_caps(works, window, softcap):
    assert_right(AttentionCase(works=works, window=window, softcap=softcap))


def test_padded_batches_and_what_lies_beyond_the_end_of_a_request():
    for works in (DECODE, MIXED):
        assert_right(AttentionCase(works=works, spare=True, garbage=float("nan")))


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_the_table_of_every_architecture(arch):
    assert_right(AttentionCase(works=((0, 9), (20, 1)), head_dim=32), arch=arch)


@pytest.mark.parametrize("size", [8, 32, 128])
def test_other_block_sizes(size):
    assert_right(AttentionCase(works=((0, size + 1), (size - 1, 3)), block_size=size))


def test_kv_in_eight_bits_is_close():
    case = AttentionCase(works=MIXED[:3], dtype="bfloat16", garbage=100.0)
    tried = Paged(backend(kv_dtype="float8_e4m3fn"), case).run()
    assert np.abs(tried.got[0] - tried.want[0]).max() < 0.25


@pytest.mark.parametrize("window", [None, 100])
def test_a_long_decode_is_split_and_merged(window):
    launch = long_decode((600, 5, 1300))
    got = triton_ops("sm_90")["attention"](*launch, scale=0.3, window=window)
    want = REFERENCE_OPS["attention"](*launch, scale=0.3, window=window)
    assert difference(got.numpy(), want.double().numpy(), "float32") is None


def test_a_split_decode_has_the_same_bits_in_any_batch():
    attention = triton_ops("sm_90")["attention"]
    together = attention(*long_decode((600, 1100)), scale=0.3)[0]
    for lengths in ((600,), (600, 3)):
        assert torch.equal(attention(*long_decode(lengths), scale=0.3)[0], together)


def test_a_short_request_has_the_same_bits_beside_one_that_is_split():
    """Alone its table is too narrow for splits; beside a long one it has one of many."""
    attention = triton_ops("sm_90")["attention"]
    alone = attention(*long_decode((400,)), scale=0.3)[0]
    assert torch.equal(attention(*long_decode((400, 1100)), scale=0.3)[0], alone)


def rows_of(case, **options):
    return Paged(backend(**options), case).run().got[0]


def test_deterministic_rows_do_not_depend_on_chunks():
    case = AttentionCase(works=((0, 80),), num_heads=2, num_kv_heads=1, head_dim=16)
    whole = rows_of(case, deterministic="true")
    for cached in (79, 65, 8):
        chunk = rows_of(replace(case, works=((cached, 80 - cached),)), deterministic="true")
        assert np.array_equal(whole[cached:], chunk)


def test_the_null_block_is_never_written():
    kv = torch.zeros(2, 3, 4, 2, 8)
    rows = torch.ones(5, 2, 8)
    write_kv(rows, rows + 1, kv, torch.tensor([0, 1, 5, 11, 0], dtype=torch.int32))
    assert not kv[:, 0].any()
    assert kv[0].flatten(0, 1)[[5, 11]].eq(1).all()
    assert kv[1].flatten(0, 1)[[5, 11]].eq(2).all()
    assert kv.sum() == 2 * 16 + 2 * 32


def test_a_block_id_out_of_range_is_caught():
    kv, rows = torch.zeros(2, 3, 4, 1, 8), torch.ones(1, 1, 8)
    with pytest.raises(InterpreterError, match="store"):
        write_kv(rows, rows, kv, torch.tensor([2 * 3 * 4 + 1], dtype=torch.int32))


def test_two_tokens_in_one_slot_are_caught():
    kv, rows = torch.zeros(2, 3, 4, 1, 8), torch.ones(2, 1, 8)
    with pytest.raises(InterpreterError, match="one address"):
        write_kv(rows, rows, kv, torch.tensor([5, 5], dtype=torch.int32))
