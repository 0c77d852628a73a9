"""BERT and its kin: RoBERTa and XLM-R (positions begin after the padding's), MPNet (so, and scores
know distances), DistilBERT (no token types, other names). MiniLM, E5, BGE and GTE are BERT or XLM-R
with other sizes.
"""

from __future__ import annotations

from tokenry.errors import ModelLoadError
from tokenry.models.config import ModelConfig
from tokenry.models.decoder import activation_of
from tokenry.models.encoder import EncoderLayerPlan, EncoderPlan, named_as

_EMBEDDINGS = {
    "embeddings.word_embeddings": "embed_tokens",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "embed_norm",
}
_LAYER = {
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "mlp_norm",
}
_MPNET_LAYER = {
    "attention.attn.q": "attention.q_proj",
    "attention.attn.k": "attention.k_proj",
    "attention.attn.v": "attention.v_proj",
    "attention.attn.o": "attention.o_proj",
    "attention.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "mlp_norm",
}
_DISTIL_LAYER = {
    "attention.q_lin": "attention.q_proj",
    "attention.k_lin": "attention.k_proj",
    "attention.v_lin": "attention.v_proj",
    "attention.out_lin": "attention.o_proj",
    "sa_layer_norm": "attention_norm",
    "ffn.lin1": "mlp.up_proj",
    "ffn.lin2": "mlp.down_proj",
    "output_layer_norm": "mlp_norm",
}


def plan(config: ModelConfig) -> EncoderPlan:
    """Post-norm, learned positions, biases everywhere. Raises ModelLoadError for relative
    positions.
    """
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ModelLoadError(
            f"position_embedding_type of this {config.architecture} is {kind!r}; only absolute "
            "positions can be served.",
            mend="another embedding model",
        )
    return EncoderPlan(
        layers=(EncoderLayerPlan(),) * config.num_layers,
        act=activation_of(config),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        positions=config.trained_len,
        token_types=config.get("type_vocab_size", 2),
        rename=named_as(_EMBEDDINGS, _LAYER, prefixes=("bert.",), layers="encoder.layer."),
    )


def plan_roberta(config: ModelConfig) -> EncoderPlan:
    """As BERT; the first token has the position pad_token_id + 1. Source: transformers,
    modeling_roberta.py, create_position_ids_from_input_ids.
    """
    base = plan(config)
    return EncoderPlan(
        layers=base.layers,
        act=base.act,
        norm_eps=config.get("layer_norm_eps", 1e-12),
        positions=config.trained_len,
        first_position=config.trained_len - config.max_len,
        token_types=config.get("type_vocab_size", 2),
        rename=named_as(_EMBEDDINGS, _LAYER, prefixes=("roberta.",), layers="encoder.layer."),
    )


def plan_mpnet(config: ModelConfig) -> EncoderPlan:
    """As RoBERTa without token types; one table of distances for all layers."""
    names = {**_EMBEDDINGS, "encoder.relative_attention_bias": "distance_bias"}
    return EncoderPlan(
        layers=(EncoderLayerPlan(),) * config.num_layers,
        act=activation_of(config),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        positions=config.trained_len,
        first_position=config.trained_len - config.max_len,
        distances=config.get("relative_attention_num_buckets", 32),
        rename=named_as(names, _MPNET_LAYER, prefixes=("mpnet.",), layers="encoder.layer."),
    )


def plan_distilbert(config: ModelConfig) -> EncoderPlan:
    """As BERT without token types."""
    return EncoderPlan(
        layers=(EncoderLayerPlan(),) * config.num_layers,
        act=activation_of(config, "activation"),
        norm_eps=1e-12,
        positions=config.trained_len,
        rename=named_as(
            _EMBEDDINGS, _DISTIL_LAYER, prefixes=("distilbert.",), layers="transformer.layer."
        ),
    )
