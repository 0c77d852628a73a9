"""sim-hpu and sim-neuron: static devices. What was not compiled before service does not run.

Both key programs by bucket and by the shape and dtype of every tensor. Before the first compile a
step runs eagerly and each new key counts as a compilation; after it a new key raises
UncoveredShape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenry.backend.base import KV, ModelSpec, Op, Program, StepBatch, StepFn, WeightIter
from tokenry.backend.contract import (
    NULL_BLOCK,
    Caps,
    HostBatch,
    KVPlan,
    KVSpec,
    PhaseRules,
    ShapeRules,
)
from tokenry.backend.ops import OpTable
from tokenry.backend.reference import Attention, ReferenceOp, write_kv
from tokenry.backend.simulators.device import SimulatedDevice, tensors_of
from tokenry.errors import BackendError, UncoveredShape

ONE_PREFILL = PhaseRules(mixed=False, max_prefill_seqs=1)


class StaticDevice(SimulatedDevice):
    """Runs only what it has compiled."""

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(memory_bytes)
        self._keys: set[Any] = set()
        self._sealed = False
        self.block_size = self.caps.block_sizes[0]

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """As any device; the block size is remembered for attn_inputs."""
        self.block_size = spec.block_size
        return super().alloc_kv(spec, num_blocks)

    def build_model(self, spec: ModelSpec, weights: WeightIter, ops: OpTable) -> StepFn:
        """The core's model behind the check of shapes."""
        step = super().build_model(spec, weights, ops)

        def checked(batch: StepBatch, kv: KV) -> Tensor:
            self._admit(batch)
            return step(batch, kv)

        return checked

    def compile(self, step: Program, example: StepBatch) -> Program:
        """A program for exactly the shapes of `example`."""
        key = _key(example)
        if key not in self._keys:
            self._keys.add(key)
            self._compiles += 1
        self._sealed = True

        def program(batch: StepBatch) -> Tensor:
            if _key(batch) != key:
                raise UncoveredShape(f"A program for {key} was given {_key(batch)}.")
            return step(batch)

        return program

    def _admit(self, batch: StepBatch) -> None:
        key = _key(batch)
        if key in self._keys:
            return
        if self._sealed:
            raise UncoveredShape(f"{batch.bucket} was not compiled before service: {key}.")
        self._keys.add(key)
        self._compiles += 1


def _key(batch: StepBatch) -> tuple[Any, ...]:
    shapes = tuple((n, tuple(t.shape), str(t.dtype)) for n, t in tensors_of(batch).items())
    return (batch.bucket, *shapes)


class SimTotal(StaticDevice):
    """sim-hpu: decode attention over one flat list of all blocks in the batch."""

    caps = Caps(
        dtypes=("float32", "bfloat16"),
        block_sizes=(16, 128),
        shapes=ShapeRules(static=True, uniform_q=True, kv_axis="total", multiple_of={"tokens": 16}),
        phases=ONE_PREFILL,
        graphs="capture",
    )

    def attn_inputs(self, host: HostBatch) -> Mapping[str, NDArray[np.int32]]:
        """For decode, per block of the batch: its id, row (-1: padding), tokens, first position."""
        if host.bucket.phase != "decode":
            return {}
        n, bs = host.bucket.kv_blocks, self.block_size
        blocks, bases = np.zeros((2, n), np.int32)
        rows, usage = np.full(n, -1, np.int32), np.zeros(n, np.int32)
        counts = -(-host.seq_lens // bs)
        if counts.sum() > n:
            raise UncoveredShape(f"The batch holds {counts.sum()} blocks, {host.bucket} has {n}.")
        at = 0
        for row, count in enumerate(counts):
            here = slice(at, at + count)
            blocks[here], rows[here] = host.block_table[row, :count], row
            bases[here] = np.arange(count) * bs
            usage[here] = np.minimum(host.seq_lens[row] - bases[here], bs)
            at += int(count)
        return {
            "block_list": blocks,
            "block_rows": rows,
            "block_usage": usage,
            "block_bases": bases,
        }

    def ops(self) -> Mapping[str, Op]:
        """Flat attention."""
        return {"attention": FlatAttention()}


class FlatAttention(ReferenceOp):
    """Paged attention block by block: partial softmax per block, then joined per row.

    Source of the scheme: published descriptions of flat paged attention (block list and groups).
    """

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
    ) -> Tensor:
        """As `base.Op`; prefill goes to the reference."""
        S, KH, D = batch.bucket.seqs, k.shape[1], q.shape[2]
        if batch.bucket.phase != "decode" or batch.bucket.tokens != S:
            return Attention()(
                q, k, v, kv_layer, batch, scale=scale, window=window, softcap=softcap
            )
        write_kv(k, v, kv_layer, batch.slots)
        rows, usage = batch.extra["block_rows"], batch.extra["block_usage"]
        index = batch.extra["block_list"].long()
        keys, values = kv_layer[0][index].float(), kv_layer[1][index].float()  # [N, bs, KH, D]
        owns = rows[:, None] == torch.arange(S, device=q.device)  # [N, S]
        one_hot = owns.float()
        at = torch.arange(keys.shape[1], device=q.device)
        seen = at < usage[:, None]  # [N, bs]
        values = torch.where(seen[:, :, None, None], values, 0.0)
        if window is not None:
            position = (owns * batch.positions[None, :]).sum(1)
            seen = seen & (batch.extra["block_bases"][:, None] + at > position[:, None] - window)
        grouped = (q.float() * scale).view(S, -1)
        spread = (one_hot @ grouped).view(-1, KH, q.shape[1] // KH, D)
        scores = torch.einsum("nkgd,nbkd->nkgb", spread, keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return _join(scores, values, seen[:, None, None, :], owns).reshape(S, -1).to(q.dtype)


def _join(scores: Tensor, values: Tensor, seen: Tensor, owns: Tensor) -> Tensor:
    """[S, KH, G, D] from the blocks' scores [N, KH, G, bs]; rows without a block give 0."""
    low = -1e30
    scores = torch.where(seen, scores, low)
    peak = scores.amax(-1)  # [N, KH, G]
    p = torch.where(seen, torch.exp(scores - peak[..., None]), 0.0)
    mass = p.sum(-1)
    partial = torch.einsum("nkgb,nbkd->nkgd", p, values)
    mine = owns[:, :, None, None]
    row_peak = torch.where(mine, peak[:, None], low).amax(0)  # [S, KH, G]
    weight = torch.where(mine, torch.exp(peak[:, None] - row_peak), 0.0)  # [N, S, KH, G]
    total = (weight * mass[:, None]).sum(0)
    out = torch.einsum("nskg,nkgd->skgd", weight, partial)
    return out / total.clamp_min(1e-30)[..., None]


class SimBaked(StaticDevice):
    """sim-neuron: the number of KV blocks is part of every program, and -1 is its null block."""

    caps = Caps(
        dtypes=("float32", "bfloat16"),
        block_sizes=(16, 32),
        shapes=ShapeRules(
            static=True, uniform_q=True, kv_axis="per_seq", multiple_of={"tokens": 16}
        ),
        phases=ONE_PREFILL,
        graphs="aot",
        kv_baked=True,
        sample_max_top_k=256,
    )

    def __init__(self, memory_bytes: int) -> None:
        super().__init__(memory_bytes)
        self._num_blocks: int | None = None

    def plan_kv(self, spec: KVSpec, budget: int, probe: Callable[[], None] | None) -> KVPlan:
        """A formula of the budget alone: the same with and without the device."""
        num_blocks = (budget * 3 // 10) // spec.block_bytes
        kv = num_blocks * spec.block_bytes
        return KVPlan(num_blocks=num_blocks, ledger={"margin": budget - kv, "kv": kv})

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """Of the size that the programs were compiled for."""
        if self._sealed and num_blocks != self._num_blocks:
            raise BackendError(
                f"Programs were compiled for {self._num_blocks} KV blocks, {num_blocks} were asked."
            )
        self._num_blocks = num_blocks
        return super().alloc_kv(spec, num_blocks)

    def compile(self, step: Program, example: StepBatch) -> Program:
        """A program that knows its KV."""
        if self._num_blocks is None:
            raise BackendError("The KV must be planned before a program is compiled (kv_baked).")
        return super().compile(step, example)

    def attn_inputs(self, host: HostBatch) -> Mapping[str, NDArray[np.int32]]:
        """Block table and slots with -1 for the null block."""
        table = np.where(host.block_table == NULL_BLOCK, -1, host.block_table)
        slots = np.where(host.slots < self.block_size, -1, host.slots)
        return {"signed_table": table.astype(np.int32), "signed_slots": slots.astype(np.int32)}

    def ops(self) -> Mapping[str, Op]:
        """Attention over the signed table."""
        return {"attention": SignedAttention()}


class SignedAttention(Attention):
    """The reference over table and slots in which -1 means nowhere."""

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
        """As `base.Op`."""
        plain = replace(
            batch,
            block_table=batch.extra["signed_table"].clamp_min(NULL_BLOCK),
            slots=batch.extra["signed_slots"].clamp_min(0),
        )
        return super().__call__(
            q, k, v, kv_layer, plain, scale=scale, window=window, softcap=softcap, sinks=sinks
        )
