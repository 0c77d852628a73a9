"""A decoder as data (`DecoderPlan`), and the step that runs it.

A family file says what is special about its architecture by filling in a plan; the code that runs
is this one. Canonical
tensor names are those of Llama checkpoints without the leading "model."; a family whose files
differ brings a `rename`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokenry.backend.base import KV, StepBatch, StepFn, WeightIter
from tokenry.errors import ModelLoadError
from tokenry.models.config import ModelConfig
from tokenry.models.layers import (
    Attention,
    AttentionPlan,
    Embedding,
    LayerNorm,
    LMHead,
    Loader,
    Norm,
    Rename,
    RmsNorm,
)
from tokenry.models.mlp import GatedMlp, Moe, MoePlan, PlainMlp
from tokenry.models.rope import rope_table

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""transformers' name -> the ops' name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormNames:
    """The checkpoint's names of a layer's norms; None where the architecture has none in that
    place.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One layer. rope: its rotary parameters, None for learned positions. moe: experts instead of
    the MLP.
    """

    attention: AttentionPlan
    rope: Mapping[str, Any] | None
    moe: MoePlan | None = None


def strip_model(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """The usual names, with or without "model." (and "language_model.") before them."""
    for prefix in ("language_model.model.", "model.language_model.", "model.", "language_model."):
        if name.startswith(prefix):
            return [(name.removeprefix(prefix), tensor)]
    return [(name, tensor)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderPlan:
    """What an architecture is.

    norm              rms | rms_plus_one (Gemma) | layer (GPT-2)
    embed_scale       multiplies embeddings; residual_scale what a block adds; logits_divisor
                      divides logits
    final_softcap     c in c * tanh(logits / c)
    positions         number of learned positions, None with rotary ones
    plain_mlp         names of a two-matrix MLP (GPT-2), None: gated. mlp_merged: gate and up are
                      one tensor.
    """

    layers: tuple[LayerPlan, ...]
    act: str
    norm_eps: float
    norm: str = "rms"
    norms: NormNames = NormNames()
    final_norm: str = "norm"
    attention_name: str = "self_attn"
    embed_scale: float | None = None
    residual_scale: float | None = None
    logits_divisor: float | None = None
    final_softcap: float | None = None
    positions: int | None = None
    plain_mlp: tuple[str, str] | None = None
    mlp_bias: bool = False
    mlp_merged: bool = False
    rename: Rename = field(default=strip_model)


def attention_of(config: ModelConfig, **changes: Any) -> AttentionPlan:
    """The attention that the config's common fields describe, with a family's changes."""
    values: dict[str, Any] = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "scale": config.head_dim**-0.5,
        **changes,
    }
    return AttentionPlan(**values)


def activation_of(config: ModelConfig, field: str = "hidden_act") -> str:
    """The op's name of the config's activation. Raises ModelLoadError for one that no op has."""
    name = config.get(field, "silu")
    if name not in ACTIVATIONS:
        raise ModelLoadError(
            f"{field} {name!r} of this {config.architecture} is not known; known: "
            f"{', '.join(ACTIVATIONS)}.",
            mend="a model with one of these activations",
        )
    return ACTIVATIONS[name]


class Layer:
    """Attention and MLP, each with the norms that the plan places around it."""

    def __init__(
        self, loader: Loader, at: str, config: ModelConfig, plan: DecoderPlan, layer: LayerPlan,
        *, table: Tensor | None,
    ) -> None:  # fmt: skip
        def norm(name: str | None) -> Norm | None:
            if name is None:
                return None
            return make_norm(loader, f"{at}.{name}", config.hidden_size, plan)

        def head_norm(loader: Loader, name: str, size: int) -> RmsNorm:
            plus_one = plan.norm == "rms_plus_one"
            return RmsNorm(loader, name, size, plan.norm_eps, plus_one=plus_one)

        names = plan.norms
        self._before_attention, self._after_attention = (
            norm(names.before_attention),
            norm(names.after_attention),
        )
        self._before_mlp, self._after_mlp = norm(names.before_mlp), norm(names.after_mlp)
        self._scale = plan.residual_scale
        self._attention = Attention(
            loader,
            f"{at}.{plan.attention_name}",
            config.hidden_size,
            layer.attention,
            table=table,
            norm=head_norm,
        )
        self._mlp = _mlp(loader, at, config, plan, layer)

    def __call__(
        self, x: Tensor, delta: Tensor | None, batch: StepBatch, kv_layer: Any
    ) -> tuple[Tensor, Tensor]:
        """The residual stream is x + delta: the addition is left to the norm that comes next."""
        h, x = _enter(self._before_attention, x, delta)
        delta = self._leave(self._after_attention, self._attention(h, batch, kv_layer))
        h, x = _enter(self._before_mlp, x, delta)
        return x, self._leave(self._after_mlp, self._mlp(h))

    def _leave(self, norm: Norm | None, y: Tensor) -> Tensor:
        if norm is not None:
            y = norm(y)
        return y if self._scale is None else y * self._scale


def _enter(norm: Norm | None, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    """(what the block sees, the residual stream with delta in it)."""
    if delta is None:
        return (x if norm is None else norm(x)), x
    if norm is None:
        total = x + delta
        return total, total
    return norm.add(delta, x)


def _mlp(
    loader: Loader, at: str, config: ModelConfig, plan: DecoderPlan, layer: LayerPlan
) -> GatedMlp | PlainMlp | Moe:
    if layer.moe is not None:
        return Moe(loader, f"{at}.{layer.moe.name}", config.hidden_size, layer.moe, plan.act)
    if plan.plain_mlp is not None:
        first, second = (f"{at}.{name}" for name in plan.plain_mlp)
        sizes = (config.hidden_size, config.intermediate_size)
        return PlainMlp(loader, (first, second), sizes, kind=plan.act)
    return GatedMlp(
        loader,
        f"{at}.mlp",
        config.hidden_size,
        config.intermediate_size,
        kind=plan.act,
        bias=plan.mlp_bias,
        merged=plan.mlp_merged,
    )


def make_norm(loader: Loader, name: str, size: int, plan: DecoderPlan) -> Norm:
    """A norm of the plan's kind."""
    if plan.norm == "layer":
        return LayerNorm(loader, name, size, plan.norm_eps)
    return RmsNorm(loader, name, size, plan.norm_eps, plus_one=plan.norm == "rms_plus_one")


Gives = Literal["logits", "hidden", "both"]
"""Of a wanted row: logits [vocab]; the last norm's output [hidden], for embeddings (the head is not
even loaded); or the one after the other, [hidden + vocab].
"""


class Decoder:
    """A whole model, built empty; `load` fills it."""

    def __init__(
        self,
        loader: Loader,
        config: ModelConfig,
        plan: DecoderPlan,
        *,
        max_len: int,
        gives: Gives = "logits",
    ) -> None:
        self._loader, self._plan, self._gives = loader, plan, gives
        scale = plan.embed_scale  # rounded to the model's dtype, as the models were trained
        self._embed_scale = (
            None if scale is None else float(torch.tensor(scale, dtype=loader.dtype))
        )
        self._embed = Embedding(loader, "embed_tokens", config.vocab_size, config.hidden_size)
        self._positions = (
            None
            if plan.positions is None
            else Embedding(loader, "positions", plan.positions, config.hidden_size)
        )
        tables: dict[str, Tensor] = {}
        self._layers = []
        for i, layer in enumerate(plan.layers):
            table = _table(tables, layer, config, max_len, loader.device)
            self._layers.append(Layer(loader, f"layers.{i}", config, plan, layer, table=table))
        self._norm = make_norm(loader, plan.final_norm, config.hidden_size, plan)
        tied = self._embed if config.tied else None
        self._head = (
            None
            if gives == "hidden"
            else LMHead(loader, config.hidden_size, config.vocab_size, tied=tied)
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors it expects, by canonical name."""
        return self._loader.shapes

    def load(self, weights: WeightIter) -> None:
        """Fill it from checkpoint tensors."""
        headless = self._head is None
        self._loader.load(
            weights,
            self._plan.rename,
            lambda name: _ignorable(name) or (headless and name.startswith(("lm_head.", "score."))),
        )

    def __call__(self, batch: StepBatch, kv: KV) -> Tensor:
        """Logits [R, vocab] float32, or what else the model gives."""
        plan = self._plan
        x = self._embed(batch.token_ids)
        if self._embed_scale is not None:
            x = x * self._embed_scale
        if self._positions is not None:
            x = x + self._positions(batch.positions)
        delta: Tensor | None = None
        for i, layer in enumerate(self._layers):
            x, delta = layer(x, delta, batch, kv[i])
        rows = batch.logit_rows.long()
        x = x[rows]
        y = self._norm.add(delta[rows], x)[0] if delta is not None else self._norm(x)
        if self._head is None:
            return y.float()
        logits = self._head(y)
        if plan.logits_divisor is not None:
            logits = logits / plan.logits_divisor
        if plan.final_softcap is not None:
            logits = plan.final_softcap * torch.tanh(logits / plan.final_softcap)
        return torch.cat((y.float(), logits), -1) if self._gives == "both" else logits


def _table(
    tables: dict[str, Tensor], layer: LayerPlan, config: ModelConfig, max_len: int, device: str
) -> Tensor | None:
    """The layer's rotary table; layers with the same parameters share one."""
    if layer.rope is None:
        return None
    key = repr(sorted(layer.rope.items()))
    if key not in tables:
        tables[key] = rope_table(
            layer.rope,
            head_dim=layer.attention.head_dim,
            max_len=max_len,
            trained_len=config.trained_len,
        ).to(device)
    return tables[key]


def _ignorable(name: str) -> bool:
    """Tensors that some checkpoints carry and nobody needs."""
    return name.endswith(("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"))


def decoder_step(decoder: Decoder) -> StepFn:
    """The decoder as a step function.

    Its caller turns autograd off (the runner is in inference mode): done in here, it would be part
    of the graph of a backend that compiles, and torch's own graph passes refuse that.
    """

    def step(batch: StepBatch, kv: KV) -> Tensor:
        return decoder(batch, kv)

    return step
