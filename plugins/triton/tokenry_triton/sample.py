"""The sample op: one program a row, no sort of the vocabulary, nothing waits for the device."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from tokenry.backend.base import SampleInputs
from tokenry.backend.reference import ReferenceOp
from tokenry_triton.kernels import sample as kernels

BLOCK = 1024
"""Logits that a program holds at a time: 16 of its registers' lanes wide when it searches."""


class Sample(ReferenceOp):
    """Draws one token per row, by the reference op's rule; a NaN or -inf is never drawn."""

    def supports(self, **meta: Any) -> bool:
        """Every vocabulary."""
        return True

    def __call__(self, logits: Tensor, inputs: SampleInputs) -> Tensor:
        """[R] int32 of logits [R, V] float32."""
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        rows, size = logits.shape
        ids = torch.empty((rows,), dtype=torch.int32, device=logits.device)
        block = min(BLOCK, triton.next_power_of_2(size))
        if not rows:
            return ids
        if inputs.all_greedy:
            kernels.greedy[(rows,)](logits, ids, logits.stride(0), size, BLOCK=block, num_warps=8)
            return ids
        kernels.sample[(rows,)](
            logits, inputs.temperature, inputs.top_k, inputs.top_p, inputs.min_p, inputs.uniform,
            ids, logits.stride(0), size, FILTER=inputs.any_filter, BLOCK=block, num_warps=8,
        )  # fmt: skip
        return ids
