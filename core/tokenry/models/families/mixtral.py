"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from tokenry.models.config import ModelConfig
from tokenry.models.decoder import DecoderPlan, LayerPlan, activation_of, attention_of
from tokenry.models.mlp import MoePlan


def plan(config: ModelConfig) -> DecoderPlan:
    """The top experts' weights are renormalized."""
    layer = LayerPlan(
        attention=attention_of(config, window=config.get("sliding_window")),
        rope=config.rope,
        moe=MoePlan(
            num_experts=config.need("num_local_experts"),
            top_k=config.get("num_experts_per_tok", 2),
            inner=config.intermediate_size,
            renormalize=True,
            name="block_sparse_moe",
            parts=("w1", "w3", "w2"),
        ),
    )
    return DecoderPlan(
        layers=(layer,) * config.num_layers,
        act=activation_of(config),
        norm_eps=config.get("rms_norm_eps", 1e-5),
    )
