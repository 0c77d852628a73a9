"""GPT-2: learned positions, LayerNorm, a plain MLP, and matrices stored transposed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from tokenry.models.config import ModelConfig
from tokenry.models.decoder import DecoderPlan, LayerPlan, NormNames, attention_of

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def plan(config: ModelConfig) -> DecoderPlan:
    """Pre-norm with biases everywhere."""
    attention = attention_of(
        config, qkv_bias=True, out_bias=True, qkv_names=("c_attn",), out_name="c_proj"
    )
    return DecoderPlan(
        layers=(LayerPlan(attention=attention, rope=None),) * config.num_layers,
        act="gelu_tanh",
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
