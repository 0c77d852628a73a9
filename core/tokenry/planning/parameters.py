"""How many weights a model has, from its config.json alone, and how they divide over devices.

In: `ModelConfig`. Out: `Part`s with counts. Counts a decoder of today: embedding, attention with
grouped heads, gated or plain feed-forward or experts, norms, head. Names no tensor, needs no torch;
tests compare with the shapes that the models room builds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenry.errors import ConfigError
from tokenry.models.config import ENCODERS, ModelConfig, read_config

Split = Literal["all", "kv_heads", "none"]


def decoder_config(path: Path) -> ModelConfig:
    """The config of a decoder. Raises ConfigError for an encoder, which has no KV cache to plan."""
    model = read_config(path)
    if model.architecture.startswith(ENCODERS):
        raise ConfigError(
            f"{model.architecture} is a bidirectional encoder: it has no KV cache and no decode "
            "steps to plan.",
            mend="tokenry serve, or tokenry embed, shows what it takes",
        )
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Weights of one sort.

    count    in the whole model.
    active   that one token is multiplied with (fewer than count where experts are chosen).
    split    over tensor-parallel devices: all; kv_heads: as far as there are heads of keys and
             values; none: every device has them.
    """

    name: str
    count: int
    active: int
    split: Split

    def on_each(self, devices: int, kv_heads: int) -> int:
        """Of `devices` equal devices, how many weights each holds."""
        return -(-self.count // self._ways(devices, kv_heads))

    def active_on_each(self, devices: int, kv_heads: int) -> int:
        """Of these, how many one token is multiplied with."""
        return -(-self.active // self._ways(devices, kv_heads))

    def _ways(self, devices: int, kv_heads: int) -> int:
        return {"all": devices, "kv_heads": min(devices, kv_heads), "none": 1}[self.split]


def parts_of(model: ModelConfig) -> list[Part]:
    """Embedding first, head last."""
    hidden, layers, vocab = model.hidden_size, model.num_layers, model.vocab_size
    plain = model.architecture.startswith("GPT2")
    query, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    qkv_bias, out_bias = _attention_biases(model, plain)
    found = [_part("embedding", vocab * hidden, active=0)]
    if plain:
        found.append(_part("positions", model.trained_len * hidden, active=0, split="none"))
    found.append(_part("attention, query and output", layers * (2 * hidden * query)))
    found.append(_part("attention, key and value", layers * (2 * hidden * kv), split="kv_heads"))
    found += _feed_forward(model, plain)
    small = layers * (_norms(model, plain) * hidden + out_bias * hidden)
    small += layers * (qkv_bias * (query + 2 * kv) + _qk_norm(model, query, kv))
    small += hidden * (2 if plain else 1)
    found.append(_part("norms and biases", small, split="none"))
    head = vocab * hidden  # a tied one is read for every row of logits, but stored once
    name = "head (the embedding)" if model.tied else "head"
    found.append(_part(name, 0 if model.tied else head, active=head))
    return found


def _part(name: str, count: int, *, active: int | None = None, split: Split = "all") -> Part:
    return Part(name=name, count=count, active=count if active is None else active, split=split)


def _attention_biases(model: ModelConfig, plain: bool) -> tuple[bool, bool]:
    """Whether query, key and value have biases, and whether the output has."""
    bias = bool(model.get("attention_bias", False)) or plain
    return bias or model.architecture.startswith("Qwen2"), bias


def _feed_forward(model: ModelConfig, plain: bool) -> list[Part]:
    """Dense layers and experts."""
    hidden, inner = model.hidden_size, model.intermediate_size
    dense = 2 * hidden * inner + inner + hidden if plain else 3 * hidden * inner
    if model.get("mlp_bias", False):
        dense += 2 * inner + hidden
    experts = model.get("num_experts") or model.get("num_local_experts", 0)
    if not experts:
        return [_part("feed-forward", model.num_layers * dense)]
    step, kept = model.get("decoder_sparse_step", 1), set(model.get("mlp_only_layers", ()))
    sparse = sum((i + 1) % step == 0 and i not in kept for i in range(model.num_layers))
    one = 3 * hidden * model.get("moe_intermediate_size", inner)
    chosen = model.get("num_experts_per_tok", 2)
    found = [
        _part("experts", sparse * experts * one, active=sparse * chosen * one),
        _part("routers", sparse * experts * hidden, split="none"),
    ]
    if sparse < model.num_layers:
        found.append(_part("feed-forward", (model.num_layers - sparse) * dense))
    return found


def _norms(model: ModelConfig, plain: bool) -> int:
    """Vectors of hidden_size that a layer's norms have."""
    if plain:
        return 4  # two norms, each with weight and bias
    return 4 if model.architecture.startswith(("Gemma2", "Gemma3")) else 2


def _qk_norm(model: ModelConfig, query: int, kv: int) -> int:
    """Weights of the norms on queries and keys of a layer."""
    if model.architecture.startswith(("Qwen3", "Gemma3")):
        return 2 * model.head_dim
    return query + kv if model.architecture.startswith("Olmo2") else 0
