"""A bidirectional encoder as data (`EncoderPlan`), and the step that runs it.

In: a batch of whole texts, padded to one length per launch: a [seqs, length] view of the packed
rows is legal, so every tensor has the bucket's shape and nothing waits for the device. Out: one
pooled float32 row per text. There is no KV: an encoder sees a text once, from both sides, so it is
never chunked and nothing of it is kept. Attention is torch's own over that view; what a row gives
depends on its text and its padded length, never on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokenry.backend.base import KV, StepBatch, StepFn, WeightIter
from tokenry.models.config import ModelConfig
from tokenry.models.layers import Embedding, LayerNorm, Linear, Loader, Rename
from tokenry.models.mlp import GatedMlp, PlainMlp
from tokenry.models.rope import rope_table

Method = Literal["cls", "mean", "last"]
"""First token, mean of all tokens, last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLayerPlan:
    """One layer. rope: its rotary parameters, None for learned positions. reach: how many tokens
    to either side are seen, None: all. norm_first: whether attention has a norm before it.
    """

    rope: dict[str, Any] | None = None
    reach: int | None = None
    norm_first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderPlan:
    """What an architecture is.

    positions    learned positions (rows of the table), None with rotary ones; the first token has
                 the position `first_position` (RoBERTa's is padding_idx + 1).
    token_types  rows of the table that tells the texts of a pair apart; 0: there is none.
    distances    rows of the table of what distances add to the scores (MPNet); 0: there is none.
    pre_norm     norms before attention and MLP and one at the end (ModernBERT), else after each
                 (BERT).
    gated        act(gate(x)) * up(x) in one matrix, else a two-matrix MLP.
    """

    layers: tuple[EncoderLayerPlan, ...]
    act: str
    norm_eps: float
    rename: Rename
    positions: int | None = None
    first_position: int = 0
    token_types: int = 0
    distances: int = 0
    pre_norm: bool = False
    gated: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """What the rows of a launch are: texts right-padded to one length.

    live      [S, L] bool, the row is a token of its text
    visible   [S, 1, L or 1, L] bool, which keys a row sees, by reach; a text without tokens (a row
              that only fills the bucket) sees its first key, for a softmax over nothing is NaN
    """

    live: Tensor
    lens: Tensor
    length: int

    @classmethod
    def of(cls, batch: StepBatch) -> Padded:
        """Shapes from the bucket, values from the batch's lengths."""
        S = batch.bucket.seqs
        length = batch.bucket.tokens // S
        lens = batch.q_lens[:S]
        at = torch.arange(length, device=lens.device)
        return cls(live=at < lens[:, None], lens=lens, length=length)

    def visible(self, reach: int | None) -> Tensor:
        """Keys that a row sees."""
        at = torch.arange(self.length, device=self.live.device)
        seen = (self.live | (at == 0))[:, None, None, :]
        if reach is None:
            return seen
        near = (at[:, None] - at[None, :]).abs() <= reach
        # a padded row far from every token still sees the first, or its softmax is NaN
        return seen & (near | (at == 0)[None, :] & ~self.live[:, None, :, None])

    def pool(self, x: Tensor, method: Method) -> Tensor:
        """[S, width] float32 of x [S, L, width]; rows of empty texts hold any finite value."""
        if method == "cls":
            return x[:, 0].float()
        if method == "last":
            last = (self.lens - 1).clamp_min(0).long()
            return x[torch.arange(x.shape[0], device=x.device), last].float()
        total = torch.where(self.live[:, :, None], x.float(), 0.0).sum(1)
        return total / self.lens.clamp_min(1)[:, None].float()


FARTHEST = 128
"""Distances from here on share one row of the table."""


class DistanceBias:
    """What the distance of two tokens adds to their score, per head: near ones each have a row of
    the table, far ones share rows by the logarithm of their distance, up to FARTHEST.

    Source: T5, arXiv 1910.10683 §2.1; transformers, modeling_mpnet.py, relative_position_bucket.
    """

    def __init__(self, loader: Loader, count: int, heads: int, *, max_len: int) -> None:
        self._table = Embedding(loader, "distance_bias", count, heads)
        self._reach = max_len - 1
        distance = torch.arange(-self._reach, self._reach + 1)  # of key and row
        half = count // 2
        near = half // 2
        far = distance.abs().float().clamp_min(1) / near
        steps = torch.log(far) / math.log(FARTHEST / near) * (half - near)
        shared = (near + steps.long()).clamp_max(half - 1)
        row = torch.where(distance.abs() < near, distance.abs(), shared)
        self._row_of = (row + (distance > 0) * half).to(loader.device)

    def __call__(self, visible: Tensor) -> Tensor:
        """[S, heads, L, L] in the model's dtype: the biases, -inf where nothing is seen."""
        at = torch.arange(visible.shape[-1], device=visible.device)
        distance = (at[None, :] - at[:, None]).clamp(-self._reach, self._reach)
        bias = self._table(self._row_of[distance + self._reach]).permute(2, 0, 1)
        return torch.where(visible, bias[None], float("-inf"))


class EncoderAttention:
    """Projections, rotation, softmax over both sides, projection."""

    def __init__(
        self, loader: Loader, name: str, config: ModelConfig, *, table: Tensor | None, bias: bool
    ) -> None:
        self._heads, self._head_dim = config.num_heads, config.head_dim
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        names = [f"{name}.{part}" for part in ("q_proj", "k_proj", "v_proj")]
        self._qkv = Linear(loader, names, [width] * 3, hidden, bias=bias)
        self._out = Linear(loader, [f"{name}.o_proj"], [hidden], width, bias=bias)
        self._table = table
        if table is not None:
            self._rope = loader.ops.resolve(
                "rope", dtype=loader.dtype_name, head_dim=self._head_dim
            )

    def __call__(self, x: Tensor, batch: StepBatch, visible: Tensor) -> Tensor:
        """[T, hidden] of x [T, hidden]; visible [S, 1 or heads, 1 or L, L], bool or added."""
        T, S = x.shape[0], batch.bucket.seqs
        q, k, v = (
            part.reshape(T, self._heads, self._head_dim) for part in self._qkv(x).chunk(3, -1)
        )
        if self._table is not None:
            q, k = self._rope(q, k, batch.positions, self._table)
        q, k, v = (
            part.reshape(S, T // S, self._heads, self._head_dim).transpose(1, 2)
            for part in (q, k, v)
        )
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self._out(y.transpose(1, 2).reshape(T, self._heads * self._head_dim))


class EncoderLayer:
    """Attention and MLP, with norms after each (BERT) or before each (ModernBERT)."""

    def __init__(
        self, loader: Loader, at: str, config: ModelConfig, plan: EncoderPlan,
        layer: EncoderLayerPlan, *, table: Tensor | None,
    ) -> None:  # fmt: skip
        hidden, inner = config.hidden_size, config.intermediate_size
        self._pre = plan.pre_norm
        self._attention = EncoderAttention(
            loader, f"{at}.attention", config, table=table, bias=plan.attention_bias
        )
        self._attention_norm = (
            None
            if plan.pre_norm and not layer.norm_first
            else LayerNorm(loader, f"{at}.attention_norm", hidden, plan.norm_eps, plan.norm_bias)
        )
        self._mlp: GatedMlp | PlainMlp
        if plan.gated:
            self._mlp = GatedMlp(
                loader, f"{at}.mlp", hidden, inner, kind=plan.act, bias=plan.mlp_bias, merged=True
            )
        else:
            names = (f"{at}.mlp.up_proj", f"{at}.mlp.down_proj")
            self._mlp = PlainMlp(loader, names, (hidden, inner), kind=plan.act)
        self._mlp_norm = LayerNorm(loader, f"{at}.mlp_norm", hidden, plan.norm_eps, plan.norm_bias)

    def __call__(self, x: Tensor, batch: StepBatch, visible: Tensor) -> Tensor:
        """[T, hidden]."""
        first = self._attention_norm
        if not self._pre and first is not None:
            x = first(x + self._attention(x, batch, visible))
            return self._mlp_norm(x + self._mlp(x))
        x = x + self._attention(x if first is None else first(x), batch, visible)
        return x + self._mlp(self._mlp_norm(x))


class Encoder:
    """A whole model, built empty; `load` fills it."""

    def __init__(
        self, loader: Loader, config: ModelConfig, plan: EncoderPlan, *, max_len: int,
        method: Method,
    ) -> None:  # fmt: skip
        self._loader, self._plan, self._method = loader, plan, method
        hidden = config.hidden_size
        self._embed = Embedding(loader, "embed_tokens", config.vocab_size, hidden)
        self._positions = (
            None
            if plan.positions is None
            else Embedding(loader, "positions", plan.positions, hidden)
        )
        self._types = (
            Embedding(loader, "token_types", plan.token_types, hidden) if plan.token_types else None
        )
        self._bias = (
            DistanceBias(loader, plan.distances, config.num_heads, max_len=max_len)
            if plan.distances
            else None
        )
        self._embed_norm = LayerNorm(loader, "embed_norm", hidden, plan.norm_eps, plan.norm_bias)
        tables: dict[str, Tensor] = {}
        self._layers = []
        for i, layer in enumerate(plan.layers):
            table = _table(tables, layer, config, max_len, loader.device)
            at = f"layers.{i}"
            self._layers.append(EncoderLayer(loader, at, config, plan, layer, table=table))
        self._final = (
            LayerNorm(loader, "norm", hidden, plan.norm_eps, plan.norm_bias)
            if plan.pre_norm
            else None
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors it expects, by canonical name."""
        return self._loader.shapes

    def load(self, weights: WeightIter) -> None:
        """Fill it from checkpoint tensors."""
        self._loader.load(weights, self._plan.rename, _ignorable)

    def __call__(self, batch: StepBatch) -> Tensor:
        """Pooled rows [S, hidden] float32, not normalised."""
        padded = Padded.of(batch)
        x = self._embed(batch.token_ids)
        if self._positions is not None:
            x = x + self._positions(batch.positions + self._plan.first_position)
        if self._types is not None:
            x = x + self._types(batch.extra[TOKEN_TYPES])
        x = self._embed_norm(x)
        masks = {layer.reach: padded.visible(layer.reach) for layer in self._plan.layers}
        if self._bias is not None:
            masks = {reach: self._bias(mask) for reach, mask in masks.items()}
        for layer, plan in zip(self._layers, self._plan.layers, strict=True):
            x = layer(x, batch, masks[plan.reach])
        if self._final is not None:
            x = self._final(x)
        return padded.pool(x.view(batch.bucket.seqs, padded.length, -1), self._method)


TOKEN_TYPES = "token_types"
"""`StepBatch.extra` of an encoder's step: [T] int32, 1 where a token is of a pair's second text."""


def _table(
    tables: dict[str, Tensor], layer: EncoderLayerPlan, config: ModelConfig, max_len: int,
    device: str,
) -> Tensor | None:  # fmt: skip
    """The layer's rotary table; layers with the same parameters share one."""
    if layer.rope is None:
        return None
    key = repr(sorted(layer.rope.items()))
    if key not in tables:
        tables[key] = rope_table(
            layer.rope, head_dim=config.head_dim, max_len=max_len, trained_len=config.trained_len
        ).to(device)
    return tables[key]


HEADS = (
    "pooler.", "cls.", "lm_head.", "classifier.", "pre_classifier.", "vocab_", "head.", "decoder.",
    "qa_outputs.", "score.",
)  # fmt: skip


def _ignorable(name: str) -> bool:
    """Heads of the training, which are no part of the encoder, and buffers."""
    return name.startswith(HEADS) or name.endswith("position_ids")


def named_as(
    table: dict[str, str], layer: dict[str, str], *, prefixes: tuple[str, ...], layers: str
) -> Rename:
    """A `rename` from two tables of name beginnings: of the whole model, and within `layers`
    ("encoder.layer."), where the number follows.
    """

    def rename(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        # names of checkpoints that were converted from TensorFlow
        name = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        if name.startswith(layers):
            number, _, rest = name.removeprefix(layers).partition(".")
            part, _, kind = rest.rpartition(".")
            return [(f"layers.{number}.{layer.get(part, part)}.{kind}", tensor)]
        part, _, kind = name.rpartition(".")
        return [(f"{table[part]}.{kind}" if part in table else name, tensor)]

    return rename


def encoder_step(encoder: Encoder) -> StepFn:
    """The encoder as a step function; it has no KV."""

    def step(batch: StepBatch, kv: KV) -> Tensor:
        return encoder(batch)

    return step
