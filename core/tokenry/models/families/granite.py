"""Granite: Llama with multipliers on embeddings, attention scores, residuals and logits."""

from __future__ import annotations

from tokenry.models.config import ModelConfig
from tokenry.models.decoder import DecoderPlan, LayerPlan, activation_of, attention_of


def plan(config: ModelConfig) -> DecoderPlan:
    """The multipliers are the config's."""
    bias = bool(config.get("attention_bias", False))
    attention = attention_of(
        config, scale=config.get("attention_multiplier", 1.0), qkv_bias=bias, out_bias=bias
    )
    return DecoderPlan(
        layers=(LayerPlan(attention=attention, rope=config.rope),) * config.num_layers,
        act=activation_of(config),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        embed_scale=config.get("embedding_multiplier", 1.0),
        residual_scale=config.get("residual_multiplier", 1.0),
        logits_divisor=config.get("logits_scaling", 1.0),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
