"""ModernBERT: rotary positions, gated MLPs, norms before, and layers that see only near tokens.

Source: arXiv 2412.13663, and transformers' configuration_modernbert.py for the defaults.
"""

from __future__ import annotations

from typing import Any

from tokenry.models.config import ModelConfig
from tokenry.models.decoder import activation_of
from tokenry.models.encoder import EncoderLayerPlan, EncoderPlan, named_as

_EMBEDDINGS = {
    "embeddings.tok_embeddings": "embed_tokens",
    "embeddings.norm": "embed_norm",
    "final_norm": "norm",
}
_LAYER = {
    "attn.Wo": "attention.o_proj",
    "attn_norm": "attention_norm",
    "mlp.Wi": "mlp.gate_up_proj",
    "mlp.Wo": "mlp.down_proj",
}
_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_THETA = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}


def plan(config: ModelConfig) -> EncoderPlan:
    """Every third layer sees all, the others half of `local_attention` tokens to either side; the
    first has no norm before its attention (the embeddings have one).
    """
    every = config.get("global_attn_every_n_layers", 3)
    default = ["sliding_attention" if i % every else "full_attention" for i in range(10**3)]
    kinds = config.get("layer_types") or default[: config.num_layers]
    reach = config.get("local_attention", 128) // 2
    layers = tuple(
        EncoderLayerPlan(
            rope=_rope(config, kind),
            reach=reach if kind == "sliding_attention" else None,
            norm_first=i > 0,
        )
        for i, kind in enumerate(kinds)
    )
    base = named_as(_EMBEDDINGS, _LAYER, prefixes=("model.",), layers="layers.")

    def rename(name: str, tensor: Any) -> Any:
        found = list(base(name, tensor))
        if ".attn.Wqkv." not in name:
            return found
        at, _, kind = found[0][0].partition(".attn.Wqkv.")
        parts = zip(_QKV, tensor.chunk(3), strict=True)
        return [(f"{at}.{part}.{kind}", piece) for part, piece in parts]

    return EncoderPlan(
        layers=layers,
        act=activation_of(config, "hidden_activation"),
        norm_eps=config.get("norm_eps", 1e-5),
        pre_norm=True,
        gated=True,
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        norm_bias=bool(config.get("norm_bias", False)),
        rename=rename,
    )


def _rope(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Parameters per kind of layer as transformers 5 writes them, or two thetas as older files."""
    own = (config.get("rope_parameters") or {}).get(kind)
    if own is not None:
        return {"rope_type": "default", "rope_theta": _THETA[kind], **own}
    name = "global_rope_theta" if kind == "full_attention" else "local_rope_theta"
    return {"rope_type": "default", "rope_theta": config.get(name, _THETA[kind])}
