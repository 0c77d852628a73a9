"""Qwen2 (biases on q, k, v), Qwen3 (norms on q and k heads), Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from tokenry.models.config import ModelConfig
from tokenry.models.decoder import DecoderPlan, LayerPlan, activation_of, attention_of
from tokenry.models.mlp import MoePlan


def plan_qwen2(config: ModelConfig) -> DecoderPlan:
    """Llama with biases on q, k and v."""
    return _plan(config, qkv_bias=True)


def plan_qwen3(config: ModelConfig) -> DecoderPlan:
    """Llama with an RMS norm on every q and k head."""
    bias = bool(config.get("attention_bias", False))
    return _plan(config, qk_norm="head", qkv_bias=bias, out_bias=bias)


def plan_qwen3_moe(config: ModelConfig) -> DecoderPlan:
    """Qwen3 with experts in every decoder_sparse_step-th layer that is not in mlp_only_layers."""
    return plan_qwen3(config)


def _plan(config: ModelConfig, **attention: Any) -> DecoderPlan:
    windowed = bool(config.get("use_sliding_window", False))
    layers = []
    for i, kind in enumerate(_layer_types(config)):
        window = config.get("sliding_window") if windowed and kind == "sliding_attention" else None
        layers.append(
            LayerPlan(
                attention=attention_of(config, window=window, **attention),
                rope=config.rope,
                moe=_moe(config, i),
            )
        )
    return DecoderPlan(
        layers=tuple(layers),
        act=activation_of(config),
        norm_eps=config.get("rms_norm_eps", 1e-6),
    )


def _layer_types(config: ModelConfig) -> tuple[str, ...]:
    """Older files have max_window_layers: the layers from there on slide."""
    if config.architecture == "Qwen3MoeForCausalLM":  # every layer slides, or none
        return ("sliding_attention",) * config.num_layers
    if config.get("layer_types"):
        return config.layer_types()
    first = config.get("max_window_layers", config.num_layers)
    return tuple(
        "sliding_attention" if i >= first else "full_attention" for i in range(config.num_layers)
    )


def _moe(config: ModelConfig, layer: int) -> MoePlan | None:
    num_experts = config.get("num_experts") or config.get("num_local_experts", 0)  # v4, v5 files
    sparse = (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    if not num_experts or not sparse or layer in config.get("mlp_only_layers", ()):
        return None
    return MoePlan(
        num_experts=num_experts,
        top_k=config.get("num_experts_per_tok", 8),
        inner=config.need("moe_intermediate_size"),
        renormalize=bool(config.get("norm_topk_prob", False)),
    )
