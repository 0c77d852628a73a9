"""GPT-2: learned positions, LayerNorm, a plain MLP, and matrices stored transposed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from tokenry.models.config import ModelConfig
from tokenry.models.decoder import DecoderPlan, LayerPlan, NormNames, activation_of, attention_of

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def plan(config: ModelConfig) -> DecoderPlan:
    """Pre-norm with biases everywhere; some (of stanford-crfm) divide the scores of layer i by
    i + 1.
    """
    scale = config.head_dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
    deeper = bool(config.get("scale_attn_by_inverse_layer_idx", False))
    layers = tuple(
        LayerPlan(
            attention=attention_of(
                config,
                scale=scale / (i + 1) if deeper else scale,
                qkv_bias=True,
                out_bias=True,
                qkv_names=("c_attn",),
                out_name="c_proj",
            ),
            rope=None,
        )
        for i in range(config.num_layers)
    )
    return DecoderPlan(
        layers=layers,
        act=activation_of(config, "activation_function"),
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        norms=NormNames(before_attention="ln_1", before_mlp="ln_2"),
        final_norm="ln_f",
        attention_name="attn",
        positions=config.max_len,
        plain_mlp=("mlp.c_fc", "mlp.c_proj"),
        rename=rename,
    )


def rename(name: str, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Canonical names, matrices as [out, in]."""
    name = name.removeprefix("transformer.")
    if name.endswith(TRANSPOSED):
        tensor = tensor.t().contiguous()
    renamed = {"wte.weight": "embed_tokens.weight", "wpe.weight": "positions.weight"}.get(name)
    if renamed is None:
        renamed = "layers." + name.removeprefix("h.") if name.startswith("h.") else name
    return [(renamed, tensor)]
