"""OLMo 2: norms after the blocks instead of before them, and one norm over all heads of q and of
k.
"""

from __future__ import annotations

from tokenry.models.config import ModelConfig
from tokenry.models.decoder import DecoderPlan, LayerPlan, NormNames, activation_of, attention_of


def plan(config: ModelConfig) -> DecoderPlan:
    """Post-norm, rotary, gated SiLU."""
    bias = bool(config.get("attention_bias", False))
    attention = attention_of(config, qk_norm="full", qkv_bias=bias, out_bias=bias)
    return DecoderPlan(
        layers=(LayerPlan(attention=attention, rope=config.rope),) * config.num_layers,
        act=activation_of(config),
        norm_eps=config.get("rms_norm_eps", 1e-5),
        norms=NormNames(
            before_attention=None,
            after_attention="post_attention_layernorm",
            before_mlp=None,
            after_mlp="post_feedforward_layernorm",
        ),
    )
