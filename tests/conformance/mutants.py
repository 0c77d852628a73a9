# ruff: noqa: RUF012, B905  # class attributes are the shared state that breaks these backends
"""Backends that break one rule each. Their parents break none: a test says so."""

import dataclasses
import itertools

import numpy as np
import torch

from tokenry.backend.base import Backend
from tokenry.backend.contract import Caps, KVPlan
from tokenry.backend.reference import (
    ActMul,
    Attention,
    Linear,
    Moe,
    ReferenceOp,
    RmsNorm,
    Rope,
    Sample,
)
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


class Plain(ReferenceOp):
    """Attention request by request, each decision a method of its own."""

    def __call__(self, q, k, v, kv_layer, batch, *, scale, window=None, softcap=None):
        self.write(k, v, kv_layer, batch)
        out = torch.zeros_like(q)
        group = q.shape[1] // k.shape[1]
        for i, (first, n, length) in enumerate(
            zip(batch.q_start.tolist(), batch.q_lens.tolist(), batch.seq_lens.tolist())
        ):
            if n:
                table = self.table(batch, i)
                keys = kv_layer[0][table].flatten(0, 1)[:length].float()
                values = kv_layer[1][table].flatten(0, 1)[:length].float()
                rows = q[first : first + n].float()
                keys, values = self.spread(keys, group), self.spread(values, group)
                scores = self.cap(torch.einsum("thd,lhd->htl", rows, keys) * scale, softcap)
                at, own = torch.arange(length), torch.arange(length - n, length)[:, None]
                p = scores.masked_fill(~self.sees(own, at, window, n), -torch.inf).softmax(-1)
                out[first : first + n] = torch.einsum("htl,lhd->thd", p, values).to(q.dtype)
        return out.flatten(1)

    def write(self, k, v, kv_layer, batch):
        self.put(k, v, kv_layer, batch.slots)

    def put(self, k, v, kv_layer, slots):
        for side, new in zip(kv_layer, (k, v)):
            side.flatten(0, 1)[slots.long()] = new

    def table(self, batch, i):
        return batch.block_table[i].long()

    def spread(self, x, group):
        return x.repeat_interleave(group, dim=1)

    def cap(self, scores, softcap):
        return scores if softcap is None else softcap * torch.tanh(scores / softcap)

    def sees(self, own, at, window, n):
        return (at <= own) if window is None else (at <= own) & (at > own - window)


class BlindAtBlockEdge(Plain):
    def sees(self, own, at, window, n):
        first_of_block = (own % 16 == 0) & (own > 0)
        return super().sees(own, at, window, n) & ~(first_of_block & (at == own))


class LooksAhead(Plain):
    def sees(self, own, at, window, n):
        return super().sees(own, at, window, n) | ((at <= own + 1) & (own % 16 == 14))


class ForgetsCache(Plain):
    def sees(self, own, at, window, n):
        return super().sees(own, at, window, n) & ((n == 1) | (at >= own.min()))


class WindowTooLong(Plain):
    def sees(self, own, at, window, n):
        return super().sees(own, at, None if window is None else window + 1, n)


class NoSoftCap(Plain):
    def cap(self, scores, softcap):
        return scores


class WrongHeads(Plain):
    def spread(self, x, group):
        return x.repeat(1, group, 1)


class ThinksContiguous(Plain):
    def __call__(self, q, k, v, kv_layer, batch, **rule):
        strides = (q.shape[1] * q.shape[2], q.shape[2], 1)
        q = q.as_strided(q.shape, strides, q.storage_offset())
        return super().__call__(q, k, v, kv_layer, batch, **rule)


class WritesPastTheSlot(Plain):
    def write(self, k, v, kv_layer, batch):
        live = batch.slots >= 16
        beyond = (batch.slots + 1).clamp(max=kv_layer.shape[1] * 16 - 1)
        self.put(k[live], v[live], kv_layer, beyond[live])
        super().write(k, v, kv_layer, batch)


class WritesPaddedRows(Plain):
    """A padded row has position 0, so it takes it for the first token of the last request."""

    def write(self, k, v, kv_layer, batch):
        padded = batch.slots < 16
        last = int(batch.q_lens.count_nonzero()) - 1
        slots = torch.where(padded, batch.block_table[last, 0] * 16, batch.slots)
        self.put(k, v, kv_layer, slots)


class WritesLastRowOnly(Plain):
    def write(self, k, v, kv_layer, batch):
        super().write(k, v, kv_layer, batch)
        for first, n in zip(batch.q_start.tolist(), batch.q_lens.tolist()):
            self.later = batch.slots[first : first + max(0, n - 1)].long()
            self.at = kv_layer

    def __call__(self, *args, **kwargs):
        out = super().__call__(*args, **kwargs)
        self.at[0].flatten(0, 1)[self.later] = 0
        return out


class PaddingShiftsTables(Plain):
    def table(self, batch, i):
        padded = int((batch.q_lens == 0).any())
        return batch.block_table[max(0, i - padded)].long()


class MultipliesNaN(Plain):
    """Reads whole blocks and gives the rest a weight of 0."""

    def __call__(self, q, k, v, kv_layer, batch, **rule):
        out = super().__call__(q, k, v, kv_layer, batch, **rule)
        for first, n, table in zip(batch.q_start, batch.q_lens, batch.block_table):
            if n:
                out[first : first + n] += 0 * kv_layer[1][table.long()].sum().to(out.dtype)
        return out


class ForgetsBias(Linear):
    def __call__(self, x, weights):
        return super().__call__(x, {"weight": weights["weight"]})


class SumsByBatchSize(Linear):
    def __call__(self, x, weights):
        w, half = weights["weight"].float(), x.shape[1] // 2
        if x.shape[0] < 8:
            return (x.float() @ w.T).to(x.dtype)
        return (x[:, :half].float() @ w[:, :half].T + x[:, half:].float() @ w[:, half:].T).to(
            x.dtype
        )


class SaysYes(Linear):
    """Has a kernel for multiples of 16, and supports() does not say so."""

    def __call__(self, x, weights):
        size = weights["weight"].shape[1] // 16 * 16
        return super().__call__(x[:, :size], {"weight": weights["weight"][:, :size]})


class PacksInPlace(Linear):
    def pack(self, weights):
        weights["weight"].mul_(2.0)
        return {**weights, "weight": weights["weight"] / 2}


class PacksIntoOneBuffer(Linear):
    buffers = {}

    def pack(self, weights):
        key = (tuple(weights["weight"].shape), weights["weight"].dtype)
        buffer = self.buffers.setdefault(key, torch.empty_like(weights["weight"]))
        return {**weights, "weight": buffer.copy_(weights["weight"])}


class ForgetsResidual(RmsNorm):
    def __call__(self, x, weight, eps, residual=None):
        y = super().__call__(x, weight, eps)
        return y if residual is None else (y, x + residual)


class TurnsByRow(Rope):
    def __call__(self, q, k, positions, table):
        return super().__call__(q, k, torch.arange(len(positions)), table)


class TurnsContiguous(Rope):
    def __call__(self, q, k, positions, table):
        q = q.as_strided(q.shape, (q.shape[1] * q.shape[2], q.shape[2], 1), q.storage_offset())
        return super().__call__(q, k, positions, table)


class TurnsPairs(Rope):
    """Neighbours are a pair, as in GPT-J, instead of halves."""

    def __call__(self, q, k, positions, table):
        rot = 2 * table.shape[2]
        order = torch.cat((torch.arange(0, rot, 2), torch.arange(1, rot, 2)))
        order = torch.cat((order, torch.arange(rot, q.shape[2])))
        turned = super().__call__(q[..., order], k[..., order], positions, table)
        return tuple(x[..., order.argsort()] for x in turned)


class GatesTheOtherHalf(ActMul):
    def __call__(self, x, kind):
        return super().__call__(x.roll(x.shape[1] // 2, dims=1), kind)


class OneGelu(ActMul):
    def __call__(self, x, kind):
        return super().__call__(x, "silu" if kind.startswith("gelu") else kind)


class NeverRenormalises(Moe):
    def __call__(self, x, router_logits, weights, *, top_k, renormalize, kind):
        return super().__call__(
            x, router_logits, weights, top_k=top_k, renormalize=False, kind=kind
        )


class LastOfEquals(Sample):
    def __call__(self, logits, inputs):
        greedy = logits.shape[1] - 1 - logits.flip(1).argmax(-1)
        zero = inputs.temperature == 0
        return torch.where(zero, greedy, super().__call__(logits, inputs)).to(torch.int32)


class SameDrawAlways(Sample):
    def __call__(self, logits, inputs):
        inputs = dataclasses.replace(inputs, uniform=torch.full_like(inputs.uniform, 0.5))
        return super().__call__(logits, inputs)


class FirstRowsTopK(Sample):
    def __call__(self, logits, inputs):
        inputs = dataclasses.replace(inputs, top_k=inputs.top_k[:1].expand(len(logits)))
        return super().__call__(logits, inputs)


class ForgetsTopP(Sample):
    def __call__(self, logits, inputs):
        inputs = dataclasses.replace(inputs, top_p=torch.ones_like(inputs.top_p))
        return super().__call__(logits, inputs)


def with_op(name, op, **caps):
    """A Device with one op of its own."""
    return type(
        op.__name__,
        (Device,),
        {"broken": {name: op}, "caps": dataclasses.replace(Device.caps, **caps)},
    )


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


class OneResultBuffer(Sample):
    buffers = {}

    def __call__(self, logits, inputs):
        drawn = super().__call__(logits, inputs)
        buffer = self.buffers.setdefault(len(drawn), torch.zeros_like(drawn))
        return buffer.copy_(drawn)


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


class FewBlocks(Attention):
    """Block ids in 4 bits."""

    def __call__(self, q, k, v, kv_layer, batch, **rule):
        table, slots = batch.block_table % 16, batch.slots % (16 * kv_layer.shape[2])
        batch = dataclasses.replace(batch, block_table=table, slots=slots)
        return super().__call__(q, k, v, kv_layer, batch, **rule)


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


MUTANTS = {
    "device": Device,
    "plain-attention": with_op("attention", Plain),
    "captured": Captured,
    "compiled": Compiled,
    "blind-at-block-edge": with_op("attention", BlindAtBlockEdge),
    "looks-ahead": with_op("attention", LooksAhead),
    "forgets-cache": with_op("attention", ForgetsCache),
    "window-too-long": with_op("attention", WindowTooLong),
    "no-soft-cap": with_op("attention", NoSoftCap),
    "wrong-heads": with_op("attention", WrongHeads),
    "thinks-contiguous": with_op("attention", ThinksContiguous),
    "thinks-rope-contiguous": with_op("rope", TurnsContiguous),
    "own-kv": OwnKV,
    "writes-past-the-slot": with_op("attention", WritesPastTheSlot),
    "writes-padded-rows": with_op("attention", WritesPaddedRows),
    "writes-last-row-only": with_op("attention", WritesLastRowOnly),
    "padding-shifts-tables": with_op("attention", PaddingShiftsTables),
    "multiplies-nan": with_op("attention", MultipliesNaN),
    "few-blocks": with_op("attention", FewBlocks),
    "forgets-bias": with_op("linear", ForgetsBias),
    "sums-by-batch-size": with_op("linear", SumsByBatchSize, batch_invariant=True),
    "says-yes": with_op("linear", SaysYes),
    "packs-in-place": with_op("linear", PacksInPlace),
    "packs-into-one-buffer": with_op("linear", PacksIntoOneBuffer),
    "forgets-residual": with_op("rms_norm", ForgetsResidual),
    "turns-by-row": with_op("rope", TurnsByRow),
    "turns-pairs": with_op("rope", TurnsPairs),
    "gates-the-other-half": with_op("act_mul", GatesTheOtherHalf),
    "one-gelu": with_op("act_mul", OneGelu),
    "never-renormalises": with_op("moe", NeverRenormalises),
    "last-of-equals": with_op("sample", LastOfEquals),
    "same-draw-always": with_op("sample", SameDrawAlways),
    "first-rows-top-k": with_op("sample", FirstRowsTopK),
    "forgets-top-p": with_op("sample", ForgetsTopP),
    "says-the-same": SaysTheSame,
    "keeps-kv": KeepsKV,
    "more-than-all": MoreThanAll,
    "plans-too-much": PlansTooMuch,
    "ledger-of-another": LedgerOfAnother,
    "blocks-without-budget": BlocksWithoutBudget,
    "untyped-oom": UntypedOOM,
    "grants-anything": GrantsAnything,
    "plans-by-what-is-used": PlansByWhatIsUsed,
    "dirty-kv": DirtyKV,
    "fetches-aliases": FetchesAliases,
    "fetches-into-one-buffer": FetchesIntoOneBuffer,
    "counts-batches": CountsBatches,
    "shifts-the-table": ShiftsTheTable,
    "wide-inputs": WideInputs,
    "ragged-inputs": RaggedInputs,
    "stale-table": StaleTable,
    "stale-tokens": StaleTokens,
    "baked-length": BakedLength,
    "recompiles-for-lengths": RecompilesForLengths,
    "counts-nothing": CountsNothing,
    "peeks-in-a-step": PeeksInAStep,
    "waits-in-a-step": WaitsInAStep,
    "loses-feedback": LosesFeedback,
    "first-logits": FirstLogits,
    "half-logits": HalfLogits,
    "noisy-in-company": NoisyInCompany,
    "claims-float64": ClaimsFloat64,
    "claims-graphs": ClaimsGraphs,
    "other-caps-each-time": OtherCapsEachTime,
    "claims-half": ClaimsHalf,
}
