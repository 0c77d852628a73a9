# ruff: noqa: RUF012  # class attributes are the shared state that breaks these backends
"""Backends that break one rule each, and the parents of most, which break none."""

import dataclasses
import itertools

import numpy as np
import torch
from mutant_ops import OneResultBuffer

from tokenry.backend.base import Backend
from tokenry.backend.contract import Caps, KVPlan
from tokenry.backend.simulators.capture import SimCapture
from tokenry.backend.simulators.device import SimulatedDevice
from tokenry.backend.simulators.static import SimBaked
from tokenry.errors import DeviceOOM

GIB = 2**30


class Device(SimulatedDevice):
    """The parent of most: dynamic shapes, the ops named in `broken` instead of the reference."""

    caps = Caps(dtypes=("float32", "bfloat16"), block_sizes=(16,))
    broken = {}

    def __init__(self):
        super().__init__(GIB)

    def ops(self):
        return {name: op() for name, op in self.broken.items()}


# ---- memory --------------------------------------------------------------------------------------


class SaysTheSame(Device):
    def memory(self):
        return dataclasses.replace(super().memory(), used=0, free=self._total)


class KeepsKV(Device):
    kept = []

    def alloc_kv(self, spec, num_blocks):
        kv = super().alloc_kv(spec, num_blocks)
        self.kept.append(kv)
        return kv


class MoreThanAll(Device):
    def memory(self):
        now = super().memory()
        return dataclasses.replace(now, free=now.total + 1)


class PlansTooMuch(Device):
    def plan_kv(self, spec, budget, probe):
        plan = super().plan_kv(spec, budget, probe)
        blocks = plan.num_blocks * 11 // 10
        return KVPlan(num_blocks=blocks, ledger={**plan.ledger, "kv": blocks * spec.block_bytes})


class LedgerOfAnother(Device):
    def plan_kv(self, spec, budget, probe):
        plan = super().plan_kv(spec, budget, probe)
        return KVPlan(num_blocks=plan.num_blocks, ledger={**plan.ledger, "kv": 0})


class BlocksWithoutBudget(Device):
    def plan_kv(self, spec, budget, probe):
        plan = super().plan_kv(spec, budget, probe)
        blocks = max(1, plan.num_blocks)
        return KVPlan(num_blocks=blocks, ledger={**plan.ledger, "kv": blocks * spec.block_bytes})


class UntypedOOM(Device):
    def alloc_kv(self, spec, num_blocks):
        try:
            return super().alloc_kv(spec, num_blocks)
        except DeviceOOM as error:
            raise RuntimeError("out of memory") from error


class GrantsAnything(Device):
    """As a kernel that overcommits."""

    def alloc_kv(self, spec, num_blocks):
        return super().alloc_kv(spec, min(num_blocks, 64))


class PlansByWhatIsUsed(SimBaked):
    def __init__(self):
        super().__init__(GIB)

    def plan_kv(self, spec, budget, probe):
        return Backend.plan_kv(self, spec, budget, probe)


class OwnKV(Device):
    """Breaks nothing: its KV is its own affair, and so would be its model."""

    def alloc_kv(self, spec, num_blocks):
        return [object()] * spec.num_layers


class DirtyKV(Device):
    pool = {}

    def alloc_kv(self, spec, num_blocks):
        key = (spec, num_blocks)
        self.pool.setdefault(key, super().alloc_kv(spec, num_blocks))
        return self.pool[key]


# ---- to the device and back ----------------------------------------------------------------------


class FetchesAliases(Device):
    def fetch(self, tensors):
        views = [t.detach() for t in tensors]
        return lambda: [view.numpy() for view in views]


class FetchesIntoOneBuffer(Device):
    buffers = {}

    def fetch(self, tensors):
        copies = []
        for i, t in enumerate(tensors):
            key = (i, tuple(t.shape), t.dtype)
            buffer = self.buffers.setdefault(key, torch.empty_like(t))
            copies.append(buffer.copy_(t))
        return lambda: [copy.numpy() for copy in copies]


class CountsBatches(Device):
    def __init__(self):
        super().__init__()
        self.count = itertools.count()

    def attn_inputs(self, host):
        return {"launch": np.full(4, next(self.count), np.int32)}


class ShiftsTheTable(Device):
    def attn_inputs(self, host):
        host.block_table[:, 0] += 1
        return {"table": host.block_table.copy()}


class WideInputs(Device):
    def attn_inputs(self, host):
        return {"lengths": host.seq_lens.astype(np.int64)}


class Captured(SimCapture):
    """Parent of those that break programs."""

    def __init__(self):
        super().__init__(GIB)


class RaggedInputs(Captured):
    def attn_inputs(self, host):
        blocks = int((-(-host.seq_lens // 16)).sum())
        return {"flat": np.zeros(blocks, np.int32)}


# ---- programs ------------------------------------------------------------------------------------


class Compiled(Device):
    """Breaks nothing: torch's compiler changes torch when it is first used, not this backend."""

    def build_model(self, spec, weights, ops):
        step = super().build_model(spec, weights, ops)
        bias = torch.compile(lambda x: x * 1.0, backend="eager")
        return lambda batch, kv: bias(step(batch, kv))


class StaleTable(Captured):
    """The block table was captured at its address; a new one is not copied there."""

    def compile(self, step, example):
        replay = super().compile(step, example)
        table = example.block_table.clone()
        return lambda batch: replay(dataclasses.replace(batch, block_table=table))


class StaleTokens(Captured):
    def compile(self, step, example):
        replay = super().compile(step, example)
        tokens = example.token_ids.clone()
        return lambda batch: replay(dataclasses.replace(batch, token_ids=tokens))


class BakedLength(Captured):
    """The longest context of the capture is the loop bound of the kernel."""

    def compile(self, step, example):
        longest = int(example.seq_lens.max()) + 15
        replay = super().compile(step, example)
        return lambda batch: replay(
            dataclasses.replace(
                batch,
                positions=batch.positions.clamp(max=longest),
                seq_lens=batch.seq_lens.clamp(max=longest + 1),
            )
        )


class RecompilesForLengths(Captured):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def compile(self, step, example):
        replay = super().compile(step, example)

        def program(batch):
            longest = int(batch.seq_lens.max()) // 32
            if (batch.bucket, longest) not in self.seen:
                self.seen.add((batch.bucket, longest))
                self._compiles += 1
            return replay(batch)

        return program


class CountsNothing(Captured):
    def compile_count(self):
        return 0


class PeeksInAStep(Captured):
    def build_model(self, spec, weights, ops):
        step = spec.torch_step(weights, ops, self.caps)

        def peeking(batch, kv):
            longest = batch.seq_lens.max().item()
            return step(batch, kv) if longest else None

        return peeking


class WaitsInAStep(Captured):
    def build_model(self, spec, weights, ops):
        step = spec.torch_step(weights, ops, self.caps)

        def waiting(batch, kv):
            logits = step(batch, kv)
            return logits if bool((batch.q_lens >= 0).all()) else -logits

        return waiting


class LosesFeedback(FetchesAliases):
    """Tokens stay where the next step draws its own."""

    broken = {"sample": OneResultBuffer}


class FirstLogits(Device):
    def build_model(self, spec, weights, ops):
        step = super().build_model(spec, weights, ops)

        def first(batch, kv):
            rows = torch.arange(len(batch.logit_rows), dtype=torch.int32)
            return step(dataclasses.replace(batch, logit_rows=rows), kv)

        return first


class HalfLogits(Device):
    def build_model(self, spec, weights, ops):
        step = super().build_model(spec, weights, ops)
        return lambda batch, kv: step(batch, kv).bfloat16()


class NoisyInCompany(Device):
    caps = dataclasses.replace(Device.caps, batch_invariant=True)

    def build_model(self, spec, weights, ops):
        step = super().build_model(spec, weights, ops)
        return lambda batch, kv: step(batch, kv) * (1 + 1e-6 * batch.bucket.seqs)


# ---- Caps ----------------------------------------------------------------------------------------


class ClaimsFloat64(Device):
    caps = dataclasses.replace(Device.caps, dtypes=("float32", "float64"))


class ClaimsGraphs(Device):
    caps = dataclasses.replace(Device.caps, graphs="cuda")


class OtherCapsEachTime(Device):
    numbers = itertools.count(1)

    def __init__(self):
        super().__init__()
        self.caps = dataclasses.replace(Device.caps, sample_max_top_k=100 + next(self.numbers))


class ClaimsHalf(Device):
    caps = dataclasses.replace(Device.caps, dtypes=("float32", "float16"))

    def alloc_kv(self, spec, num_blocks):
        if spec.dtype == "float16":
            raise TypeError("no kernel for Half")
        return super().alloc_kv(spec, num_blocks)
