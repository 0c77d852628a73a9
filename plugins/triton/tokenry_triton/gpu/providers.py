"""Attention of a vendor's library in place of the plugin's own, for the steps that it can do.

In: the op that it stands before, and how keys and values are written. Out: an op of the contract.
A library's function must take the paged KV and the batch's tensors on the device as they are: no
host copy, no plan made on the host, so that a step can be captured. Knows no vendor's name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenry.backend.base import Op, StepBatch
from tokenry.backend.reference import ReferenceOp

HALVES = (torch.float16, torch.bfloat16)
WriteKV = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""k, v, kv_layer, slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A layer's scores, see `tokenry.backend.base.Op`. width: keys that a table has room for."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    width: int

    @property
    def left(self) -> int:
        """Tokens before itself that a row sees, -1: all."""
        return -1 if self.window is None else self.window - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What `can` looks at: all of it is known without the device."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    head_dim: int
    heads: int
    kv_heads: int
    block_size: int
    decode: bool
    softcap: bool
    sinks: bool


class Provided(ReferenceOp):
    """A library's attention where it can, the own op elsewhere. calls: launches by (who, phase)."""

    block_sizes: tuple[int, ...] | None = None
    """What the KV must be cut into for it; None: as it is."""

    def __init__(self, name: str, own: Op, write: WriteKV) -> None:
        self.name, self._own, self._write = name, own, write

    def supports(self, **meta: Any) -> bool:
        """What the own op does: it takes over where the library cannot."""
        return self._own.supports(**meta)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_layer: Tensor,
        batch: StepBatch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """[T, num_heads * head_dim], 0 where a row is padding."""
        bucket, (_, _, block_size, kv_heads, head_dim) = batch.bucket, kv_layer.shape
        decode = bucket.phase == "decode" and bucket.tokens == bucket.seqs
        launch = Launch(
            dtype=q.dtype, kv_dtype=kv_layer.dtype, head_dim=head_dim, heads=q.shape[1],
            kv_heads=kv_heads, block_size=block_size, decode=decode, softcap=softcap is not None,
            sinks=sinks is not None,
        )  # fmt: skip
        if not self.can(launch):
            rest: Mapping[str, Any] = {} if sinks is None else {"sinks": sinks}
            out: Tensor = self._own(
                q, k, v, kv_layer, batch, scale=scale, window=window, softcap=softcap, **rest
            )
            return out
        self._write(k, v, kv_layer, batch.slots)
        rule = Rule(
            scale=scale, window=window, softcap=softcap, sinks=sinks,
            width=batch.block_table.shape[1] * block_size,
        )  # fmt: skip
        given = self.attend(q.contiguous(), kv_layer, batch, rule, decode=decode)
        # a row that belongs to no request was not computed
        live = torch.arange(q.shape[0], device=q.device) < batch.q_start[-1]
        if decode:
            live = batch.q_lens > 0
        return torch.where(live[:, None], given.reshape(q.shape[0], -1), 0.0)

    @abstractmethod
    def can(self, launch: Launch) -> bool:
        """Whether the library has this."""

    @abstractmethod
    def attend(
        self, q: Tensor, kv_layer: Tensor, batch: StepBatch, rule: Rule, *, decode: bool
    ) -> Tensor:
        """[T, H, D] of q [T, H, D]; the KV has the new tokens already."""


MakeProvider = Callable[[str, Op, WriteKV], Provided]
"""From the architecture, the own op and its writer. Raises ConfigError where the library is missing
or not for the architecture.
"""


def fits_halves(launch: Launch, *, most_dim: int = 256, step: int = 8) -> bool:
    """float16 or bfloat16 throughout, a head dim in steps up to the largest, whole groups."""
    return (
        launch.dtype in HALVES
        and launch.kv_dtype == launch.dtype
        and launch.head_dim % step == 0
        and launch.head_dim <= most_dim
        and launch.heads % launch.kv_heads == 0
    )
