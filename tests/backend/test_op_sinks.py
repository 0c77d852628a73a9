"""A layer with sinks gets an op that takes them."""

from __future__ import annotations

from tokenry.backend.ops import OpTable
from tokenry.backend.reference import REFERENCE_OPS, ReferenceOp


class Old(ReferenceOp):
    """Attention of before there were sinks; it says yes to everything."""

    def __call__(self, q, k, v, kv_layer, batch, *, scale, window=None, softcap=None):
        return q


class New(ReferenceOp):
    """Attention that takes them."""

    def __call__(self, q, k, v, kv_layer, batch, *, scale, window=None, softcap=None, sinks=None):
        return q


def test_an_op_that_cannot_take_sinks_is_not_asked_to():
    old, new = OpTable({"attention": Old()}), OpTable({"attention": New()})
    assert old.resolve("attention", head_dim=64) is old.resolve("attention", sinks=False)
    assert old.resolve("attention", head_dim=64, sinks=True) is REFERENCE_OPS["attention"]
    assert isinstance(new.resolve("attention", head_dim=64, sinks=True), New)
    assert (old.fallbacks, new.fallbacks) == ({"attention": 1}, {})
