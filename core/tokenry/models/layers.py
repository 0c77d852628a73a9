"""The parts that decoders are made of: each holds its weights and finds its op once, when it is
built.

Plain classes, not torch modules: a step calls them a few hundred times, and nothing here is
trained. A part asks the
`Loader` for the checkpoint tensors it is made of; a merged linear is packed as soon as its last
part has come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenry.backend.base import Op, StepBatch, WeightIter
from tokenry.backend.ops import OpTable
from tokenry.errors import ModelLoadError

Accept = Callable[[Tensor], None]
Rename = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]
"""(name, tensor) of the checkpoint -> canonical ones."""
_NARROW = frozenset({torch.bfloat16, torch.float16})


class Loader:
    """Brings checkpoint tensors to the parts that expect them. Owned by the model being built.

    where: tensor name in the checkpoint -> the file that has it, for errors.
    """

    def __init__(
        self,
        ops: OpTable,
        *,
        dtype: str,
        device: str,
        where: Callable[[str], str] = lambda name: "the checkpoint",
    ) -> None:
        self.ops = ops
        self.dtype_name = dtype
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = device
        self._where = where
        self._expected: dict[str, tuple[tuple[int, ...], Accept]] = {}
        self._optional: set[str] = set()
        self._narrow: set[str] = set()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors that must come."""
        return {n: shape for n, (shape, _) in self._expected.items() if n not in self._optional}

    def expect(
        self,
        name: str,
        shape: tuple[int, ...],
        accept: Accept,
        *,
        optional: bool = False,
        narrow: bool = False,
    ) -> None:
        """`accept` wants this tensor; an optional one may stay away. narrow: 16 bits of a wider
        model may come as they are stored.
        """
        self._expected[name] = (shape, accept)
        if optional:
            self._optional.add(name)
        if narrow:
            self._narrow.add(name)

    def load(self, weights: WeightIter, rename: Rename, ignorable: Callable[[str], bool]) -> None:
        """Deliver all tensors, each under the name(s) that `rename` gives it.

        Raises ModelLoadError for a missing, unexpected or misshapen one.
        """
        missing = dict(self._expected)
        for stored, raw in weights:
            for name, tensor in rename(stored, raw):
                entry = missing.pop(name, None)
                if entry is not None:
                    shape, accept = entry
                    self._check(stored, tensor, shape)
                    accept(tensor.to(self.device, self._kept(name, tensor)))
                elif name not in self._expected and not ignorable(name):
                    raise ModelLoadError(
                        f"{self._where(stored)}: the tensor {stored} {list(tensor.shape)} is none "
                        "of this architecture's.",
                        mend="are config.json and the weights of one model?",
                    )
        lacking = sorted(missing.keys() - self._optional)
        if lacking:
            names = ", ".join(lacking[:3])
            raise ModelLoadError(
                f"{self._where('')} lacks {len(lacking)} tensors, among them {names}.",
                mend="are config.json and the weights of one model, and is the download complete?",
            )

    def _kept(self, name: str, tensor: Tensor) -> torch.dtype:
        """The dtype in which a tensor is handed on."""
        narrow = tensor.dtype in _NARROW and tensor.itemsize < self.dtype.itemsize
        return tensor.dtype if narrow and name in self._narrow else self.dtype

    def _check(self, stored: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ModelLoadError(
                f"{self._where(stored)}: the tensor {stored} has shape {list(tensor.shape)}, "
                f"config.json says {list(shape)}.",
                mend="are config.json and the weights of one model?",
            )


class Linear:
    """x @ W.T + b through the `linear` op; W may be several checkpoint tensors, stacked along the
    output.
    """

    def __init__(
        self, loader: Loader, names: Sequence[str], sizes: Sequence[int], width: int, *, bias: bool,
        exact: bool = False,
    ) -> None:  # fmt: skip
        """exact: small and decisive (a router): never quantised."""
        self._op: Op = loader.ops.resolve(
            "linear", dtype=loader.dtype_name, in_features=width, out_features=sum(sizes)
        )
        self.weights: Any = None
        parts: dict[str, Tensor] = {}
        kinds = ("weight", "bias") if bias else ("weight",)
        total = len(names) * len(kinds)

        def accept(key: str) -> Accept:
            def take(tensor: Tensor) -> None:
                parts[key] = tensor
                if len(parts) == total:
                    raw = {k: _stacked([parts.pop(f"{n}.{k}") for n in names]) for k in kinds}
                    pack = self._op.pack if exact else partial(loader.ops.pack, self._op)
                    self.weights = pack(raw)

            return take

        for name, size in zip(names, sizes, strict=True):
            weight = f"{name}.weight"
            loader.expect(weight, (size, width), accept(weight), narrow=_takes_narrow(self._op))
            if bias:
                loader.expect(f"{name}.bias", (size,), accept(f"{name}.bias"))

    def __call__(self, x: Tensor) -> Tensor:
        """[T, sum(sizes)]."""
        y: Tensor = self._op(x, self.weights)
        return y


def _takes_narrow(op: Op) -> bool:
    return bool(getattr(op, "takes_narrow", False))


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Along the first dimension; a copy only where there is something to join."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class RmsNorm:
    """Through the `rms_norm` op. plus_one: the checkpoint stores weight - 1 (Gemma)."""

    def __init__(
        self, loader: Loader, name: str, size: int, eps: float, *, plus_one: bool = False
    ) -> None:
        self._op: Op = loader.ops.resolve("rms_norm", dtype=loader.dtype_name, size=size)
        self._eps = eps
        self.weight = torch.empty(0)

        def take(tensor: Tensor) -> None:
            self.weight = tensor.float() + 1 if plus_one else tensor

        loader.expect(f"{name}.weight", (size,), take)

    def __call__(self, x: Tensor) -> Tensor:
        """Of x."""
        y: Tensor = self._op(x, self.weight, self._eps)
        return y

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Of x + residual, and that sum."""
        y: tuple[Tensor, Tensor] = self._op(x, self.weight, self._eps, residual)
        return y


class LayerNorm:
    """Mean and variance normalisation, with a bias or (ModernBERT) without."""

    def __init__(
        self, loader: Loader, name: str, size: int, eps: float, biased: bool = True
    ) -> None:
        self._eps = eps
        self._size = (size,)
        self.weight = torch.empty(0)
        self.bias: Tensor | None = None
        loader.expect(f"{name}.weight", self._size, lambda t: setattr(self, "weight", t))
        if biased:
            loader.expect(f"{name}.bias", self._size, lambda t: setattr(self, "bias", t))

    def __call__(self, x: Tensor) -> Tensor:
        """Of x."""
        return functional.layer_norm(x, self._size, self.weight, self.bias, self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Of x + residual, and that sum."""
        total = x + residual
        return self(total), total


Norm = RmsNorm | LayerNorm


class Embedding:
    """Rows of a table."""

    def __init__(self, loader: Loader, name: str, count: int, size: int) -> None:
        self.weight = torch.empty(0)
        self._listeners: list[Accept] = []
        loader.expect(f"{name}.weight", (count, size), self._take)

    def _take(self, tensor: Tensor) -> None:
        self.weight = tensor
        for listener in self._listeners:
            listener(tensor)

    def tie(self, listener: Accept) -> None:
        """Somebody else wants the same table, now if it is here already."""
        self._listeners.append(listener)
        if self.weight.numel():
            listener(self.weight)

    def __call__(self, ids: Tensor) -> Tensor:
        """[T, size]."""
        return functional.embedding(ids, self.weight)


class LMHead:
    """Logits of the wanted rows; its weight may be the embedding's. If the file has one as well, it
    must be the same: a model with another head under a tied config is not this model.
    """

    def __init__(self, loader: Loader, size: int, vocab: int, *, tied: Embedding | None) -> None:
        self._op: Op = loader.ops.resolve(
            "linear", dtype=loader.dtype_name, in_features=size, out_features=vocab
        )
        self.weights: Any = None

        def take(tensor: Tensor) -> None:
            self.weights = loader.ops.pack(self._op, {"weight": tensor}, head=True)

        if tied is None:
            narrow = _takes_narrow(self._op)
            loader.expect("lm_head.weight", (vocab, size), take, narrow=narrow)
            return
        pair: list[Tensor] = []

        def compare(tensor: Tensor) -> None:
            pair.append(tensor.cpu())
            if len(pair) == 2 and not torch.equal(*pair):
                raise ModelLoadError(
                    "The checkpoint has an lm_head.weight that is not the embedding, config.json "
                    "says that both are one (tie_word_embeddings).",
                    mend='"tie_word_embeddings": false in config.json, if the head was trained',
                )

        def compare_head(tensor: Tensor) -> None:
            tied.tie(compare)
            compare(tensor)

        tied.tie(take)
        loader.expect("lm_head.weight", (vocab, size), compare_head, optional=True)

    def __call__(self, x: Tensor) -> Tensor:
        """[R, vocab] float32."""
        y: Tensor = self._op(x, self.weights)
        return y.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """What one layer's attention is. qk_norm: none, per head (Qwen3, Gemma 3), or over all heads
    (OLMo 2).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str = "none"
    qkv_names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out_name: str = "o_proj"


class Attention:
    """Projections, rotation, the `attention` op on this layer's KV, projection."""

    def __init__(
        self,
        loader: Loader,
        name: str,
        hidden: int,
        plan: AttentionPlan,
        *,
        table: Tensor | None,
        norm: Callable[[Loader, str, int], RmsNorm],
    ) -> None:
        p = self._plan = plan
        self._q_size, self._kv_size = p.num_heads * p.head_dim, p.num_kv_heads * p.head_dim
        sizes: tuple[int, ...] = (self._q_size, self._kv_size, self._kv_size)
        if len(p.qkv_names) == 1:
            sizes = (sum(sizes),)
        names = [f"{name}.{part}" for part in p.qkv_names]
        self._qkv = Linear(loader, names, sizes, hidden, bias=p.qkv_bias)
        self._out = Linear(
            loader, [f"{name}.{p.out_name}"], [hidden], self._q_size, bias=p.out_bias
        )
        self._table = None if table is None else table.to(loader.device)
        self._rope = loader.ops.resolve("rope", dtype=loader.dtype_name, head_dim=p.head_dim)
        self._attention = loader.ops.resolve(
            "attention",
            dtype=loader.dtype_name,
            head_dim=p.head_dim,
            num_heads=p.num_heads,
            num_kv_heads=p.num_kv_heads,
            window=p.window,
            softcap=p.softcap,
        )
        self._q_norm = self._k_norm = None
        if p.qk_norm != "none":
            per_head = p.qk_norm == "head"
            self._q_norm = norm(loader, f"{name}.q_norm", p.head_dim if per_head else self._q_size)
            self._k_norm = norm(loader, f"{name}.k_norm", p.head_dim if per_head else self._kv_size)

    def __call__(self, x: Tensor, batch: StepBatch, kv_layer: Any) -> Tensor:
        """[T, hidden]."""
        p = self._plan
        T = x.shape[0]
        q, k, v = self._qkv(x).split_with_sizes((self._q_size, self._kv_size, self._kv_size), -1)
        if p.qk_norm == "full" and self._q_norm and self._k_norm:
            q, k = self._q_norm(q), self._k_norm(k)
        q, k = q.reshape(T, p.num_heads, p.head_dim), k.reshape(T, p.num_kv_heads, p.head_dim)
        if p.qk_norm == "head" and self._q_norm and self._k_norm:
            q, k = self._q_norm(q), self._k_norm(k)
        if self._table is not None:
            q, k = self._rope(q, k, batch.positions, self._table)
        v = v.reshape(T, p.num_kv_heads, p.head_dim)
        y = self._attention(
            q, k, v, kv_layer, batch, scale=p.scale, window=p.window, softcap=p.softcap
        )
        return self._out(y)
