# ruff: noqa: RUF012, B905  # class attributes are the shared state that breaks these ops
"""Ops that break one rule each, and the parents of some, which break none."""

import dataclasses

import torch

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


class MissesNan(Sample):
    """A NaN is found only where it comes first."""

    def checked(self, logits, inputs):
        broken = logits[:, 0].isnan() | logits.nan_to_num(nan=-torch.inf).amax(-1).isinf()
        return self(logits, inputs), broken.to(torch.uint8)


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


class FewBlocks(Attention):
    """Block ids in 4 bits."""

    def __call__(self, q, k, v, kv_layer, batch, **rule):
        table, slots = batch.block_table % 16, batch.slots % (16 * kv_layer.shape[2])
        batch = dataclasses.replace(batch, block_table=table, slots=slots)
        return super().__call__(q, k, v, kv_layer, batch, **rule)


class OneResultBuffer(Sample):
    buffers = {}

    def __call__(self, logits, inputs):
        drawn = super().__call__(logits, inputs)
        buffer = self.buffers.setdefault(len(drawn), torch.zeros_like(drawn))
        return buffer.copy_(drawn)
