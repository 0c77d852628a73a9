"""The reference ops row by row: a row's bits depend on no other row, nor on where a prompt is cut.

In, out: as the reference ops. Slow: for a simulated device's `deterministic` mode. Sums over a row
are in an order that its length alone fixes, because every row is computed by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenry.backend import reference
from tokenry.backend.base import Op, StepBatch
from tokenry.backend.reference import Attention, ReferenceOp


class Rows(ReferenceOp):
    """An op whose first tensors have a row per token, called once for each of them.

    paired   how many of its positional arguments are such tensors.
    """

    def __init__(self, op: Op, paired: int = 1) -> None:
        self._op, self._paired = op, paired

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the op says."""
        rows, rest = args[: self._paired], args[self._paired :]
        found = [
            self._op(*(t[i : i + 1] for t in rows), *rest, **kwargs) for i in range(len(rows[0]))
        ]
        return torch.cat(found)


class RowNorm(ReferenceOp):
    """RmsNorm, whose residual has rows, too."""

    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Gives y, or (y, x + residual)."""
        total = x if residual is None else x + residual
        norm: Op = reference.RmsNorm()
        y = torch.cat([norm(total[i : i + 1], weight, eps) for i in range(len(total))])
        return y if residual is None else (y, total)


class RowAttention(ReferenceOp):
    """Attention of one row at a time, over all columns of the block table."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, kv_layer: Tensor, batch: StepBatch, **rule: Any
    ) -> Tensor:
        """As reference.Attention."""
        reference.write_kv(k, v, kv_layer, batch.slots)
        T, S = batch.bucket.tokens, batch.bucket.seqs
        rows = torch.arange(T, device=q.device, dtype=batch.q_start.dtype)
        owner = (torch.searchsorted(batch.q_start, rows, right=True) - 1).clamp(0, S - 1)
        live = (rows - batch.q_start[owner] < batch.q_lens[owner]).to(batch.q_lens.dtype)
        one = Attention()
        found = []
        for i in range(T):
            alone = replace(
                batch,
                bucket=replace(batch.bucket, seqs=1, tokens=1),
                positions=batch.positions[i : i + 1],
                slots=batch.slots[i : i + 1],
                q_start=torch.arange(2, device=q.device, dtype=batch.q_start.dtype),
                q_lens=live[i : i + 1],
                seq_lens=batch.seq_lens[owner[i : i + 1]],
                block_table=batch.block_table[owner[i : i + 1]],
            )
            row = slice(i, i + 1)
            found.append(one(q[row], k[row], v[row], kv_layer, alone, **rule))
        return torch.cat(found)


def rowwise_ops() -> Mapping[str, Op]:
    """All but rope and sample, which are elementwise or by rows already."""
    return {
        "attention": RowAttention(),
        "linear": Rows(reference.Linear()),
        "rms_norm": RowNorm(),
        "act_mul": Rows(reference.ActMul()),
        "moe": Rows(reference.Moe(), 2),
    }
