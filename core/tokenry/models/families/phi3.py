"""Phi-3: Llama with q, k, v in one tensor, gate and up in one, and longrope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenry.models.config import ModelConfig
from tokenry.models.decoder import DecoderPlan, LayerPlan, activation_of, attention_of


def plan(config: ModelConfig) -> DecoderPlan:
    """The checkpoint has its matrices merged already."""
    attention = attention_of(config, window=config.get("sliding_window"), qkv_names=("qkv_proj",))
    return DecoderPlan(
        layers=(LayerPlan(attention=attention, rope=_rope(config)),) * config.num_layers,
        act=activation_of(config),
        norm_eps=config.get("rms_norm_eps", 1e-5),
        mlp_merged=True,
    )


def _rope(config: ModelConfig) -> Mapping[str, Any]:
    """The length that longrope was trained at may stand beside the rope parameters."""
    outer = {"original_max_position_embeddings": config.get("original_max_position_embeddings")}
    rope = {**outer, **config.rope}
    if rope["rope_type"] == "su":
        rope["rope_type"] = "longrope"
    return rope
