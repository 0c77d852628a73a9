"""Llama 2 and 3.x, and Mistral (the same with a sliding window)."""

from __future__ import annotations

from tokenry.models.config import ModelConfig
from tokenry.models.decoder import DecoderPlan, LayerPlan, activation_of, attention_of


def plan(config: ModelConfig) -> DecoderPlan:
    """Pre-norm, rotary, gated SiLU."""
    bias = bool(config.get("attention_bias", False))
    window = config.get("sliding_window") if config.architecture == "MistralForCausalLM" else None
    attention = attention_of(config, window=window, qkv_bias=bias, out_bias=bias)
    return DecoderPlan(
        layers=(LayerPlan(attention=attention, rope=config.rope),) * config.num_layers,
        act=activation_of(config),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
