"""Gemma 2 and 3 (text): norms around each block, scaled embeddings, local and global layers in
turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tokenry.models.config import ModelConfig
from tokenry.models.decoder import (
    DecoderPlan,
    LayerPlan,
    NormNames,
    activation_of,
    attention_of,
    strip_model,
)

SANDWICH = NormNames(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def plan_gemma2(config: ModelConfig) -> DecoderPlan:
    """Soft-capped scores and logits; even layers slide."""
    kinds = config.get("layer_types") or [
        "sliding_attention" if i % 2 == 0 else "full_attention" for i in range(config.num_layers)
    ]
    return _plan(config, kinds, qk_norm="none")


def plan_gemma3(config: ModelConfig) -> DecoderPlan:
    """Norms on q and k heads; five local layers to a global one, each kind with its own rotary
    base.
    """
    every = config.get("sliding_window_pattern", 6)
    kinds = config.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention"
        for i in range(config.num_layers)
    ]
    return _plan(config, kinds, qk_norm="head")


def _plan(config: ModelConfig, kinds: list[str], *, qk_norm: str) -> DecoderPlan:
    bias = bool(config.get("attention_bias", False))
    layers = tuple(
        LayerPlan(
            attention=attention_of(
                config,
                scale=config.get("query_pre_attn_scalar", config.head_dim) ** -0.5,
                window=config.get("sliding_window") if kind == "sliding_attention" else None,
                softcap=config.get("attn_logit_softcapping"),
                qk_norm=qk_norm,
                qkv_bias=bias,
                out_bias=bias,
            ),
            rope=_rope(config, kind),
        )
        for kind in kinds
    )
    return DecoderPlan(
        layers=layers,
        act=activation_of(config, "hidden_activation"),
        norm="rms_plus_one",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        norms=SANDWICH,
        embed_scale=config.hidden_size**0.5,
        final_softcap=config.get("final_logit_softcapping"),
        rename=_text_only,
    )


def _text_only(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """The usual names, without what a composite Gemma 3 has for images."""
    if "vision_tower." in name or "multi_modal_projector." in name:
        return []
    return strip_model(name, tensor)


def _rope(config: ModelConfig, kind: str) -> Mapping[str, Any]:
    """Per kind of layer where the file has it so; older Gemma 3 files name the local base apart."""
    rope = config.rope
    if kind in rope:
        return dict(rope[kind])
    if kind == "sliding_attention" and config.get("rope_local_base_freq"):
        return {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq")}
    return rope
