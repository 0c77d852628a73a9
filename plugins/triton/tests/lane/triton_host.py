"""A backend whose kernels are interpreted on the host, so that the conformance kit can try them."""

from __future__ import annotations

import torch

from tokenry.backend.base import Backend
from tokenry.backend.contract import Caps, MemoryInfo, PhaseRules, ShapeRules
from tokenry_triton.ops import triton_ops


class HostBackend(Backend):
    """Tensors on the host, ops from Triton's interpreter."""

    def __init__(
        self, arch="sm_90", *, kv_axis="per_seq", kv_dtype=None,
        dtypes=("float32", "float16", "bfloat16"), **options,
    ):  # fmt: skip
        self.caps = Caps(
            dtypes=dtypes,
            batch_invariant=options.get("deterministic") == "true",
            block_sizes=(16,),
            shapes=ShapeRules(kv_axis=kv_axis),
            phases=PhaseRules(mixed=True, chunked=True),
        )
        self._ops = triton_ops(arch, options)
        self._kv_dtype = kv_dtype

    def memory(self):
        """Of no interest here."""
        return MemoryInfo(total=2**30, free=2**30, used=0)

    def ops(self):
        """The kernels."""
        return self._ops

    def alloc_kv(self, spec, num_blocks):
        """In `kv_dtype`, if one was given."""
        layers = super().alloc_kv(spec, num_blocks)
        if self._kv_dtype is None:
            return layers
        return [layer.to(getattr(torch, self._kv_dtype)) for layer in layers]
