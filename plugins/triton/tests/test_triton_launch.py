"""The table of launch parameters."""

from __future__ import annotations

import pytest

from tokenry.backend.reference import REFERENCE_OPS
from tokenry.errors import BackendError
from tokenry_triton.launch import ARCHS, arch_of
from tokenry_triton.ops import triton_ops


def test_every_op_of_the_contract_is_there():
    assert triton_ops("sm_90").keys() == REFERENCE_OPS.keys()


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("sm_90", "sm_90"), ("sm_86", "sm_80"), ("sm_89", "sm_89"), ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("gfx942", "gfx942"), ("gfx950", "gfx950"), ("gfx941", "gfx90a"),
    ],
)  # fmt: skip
def test_an_architecture_without_an_entry_gets_the_newest_older_one(asked, found):
    assert arch_of(asked).name == found


@pytest.mark.parametrize("old", ["sm_75", "gfx906"])
def test_one_older_than_all_is_refused_with_a_mend(old):
    with pytest.raises(BackendError, match=f"no kernels for {old}") as caught:
        arch_of(old)
    assert "newer" in str(caught.value.mend)


@pytest.mark.parametrize("arch", ARCHS.values(), ids=list(ARCHS))
def test_splits_are_whole_tiles_and_every_head_dim_has_one(arch):
    for decode in (True, False):
        for dim in (16, 64, 80, 128, 192, 256):
            tile = arch.attention(head_dim=dim, decode=decode)
            assert arch.split % tile.n == 0
            assert tile.m >= 16


def test_what_the_kernels_cannot_do_is_said():
    ops = triton_ops("sm_90")
    assert not ops["attention"].supports(dtype="float32", head_dim=512, num_heads=8, num_kv_heads=8)
    assert not ops["attention"].supports(dtype="float64", head_dim=64)
    assert not ops["rms_norm"].supports(dtype="float32", size=65536)
    assert ops["attention"].supports(dtype="bfloat16", head_dim=128, num_heads=71, num_kv_heads=2)
