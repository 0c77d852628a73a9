"""Fields of a config.json that would make another model of it than the one we compute.

In: a config whose architecture has a native plan. Out: nothing, or ModelLoadError; and notes for
fields that the architecture does not have, which are passed over as transformers passes them over.
A wrong answer must never be the sign that a field was not read.
"""

from __future__ import annotations

from tokenry.errors import ModelLoadError
from tokenry.models.config import ModelConfig

NOT_CAUSAL = ("use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention")
"""Fields that mean: no decoder. True in none that we can serve."""
MIXED_LAYERS = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures, beside Gemma's, whose layers may differ in kind."""
WITHOUT_WINDOW = ("LlamaForCausalLM", "GraniteForCausalLM", "Olmo2ForCausalLM", "GPT2LMHeadModel")
KINDS = {"full_attention", "sliding_attention"}


def check_fields(config: ModelConfig) -> tuple[str, ...]:
    """Notes for the start-up log. Raises ModelLoadError that names the field and its value."""
    for name in NOT_CAUSAL:
        if config.get(name):
            raise _refused(config, name, "only causal decoders can be served")
    if config.get("is_causal") is False:
        raise _refused(config, "is_causal", "only causal decoders can be served")
    _check_layers(config)
    if config.architecture in WITHOUT_WINDOW and config.get("sliding_window"):
        return (
            f"sliding_window {config.get('sliding_window')} of config.json is passed over: "
            f"{config.architecture} has no window",
        )
    return ()


def _check_layers(config: ModelConfig) -> None:
    """`layer_types` must be as many as layers, and of kinds that the architecture tells apart."""
    kinds = config.get("layer_types")
    if kinds is None:
        return
    if len(kinds) != config.num_layers:
        raise _refused(config, "layer_types", f"there are {config.num_layers} layers")
    strange = set(kinds) - KINDS
    if strange:
        raise _refused(config, "layer_types", f"{sorted(strange)[0]} is not known")
    if config.architecture in MIXED_LAYERS or config.architecture.startswith("Gemma"):
        return
    used = config.get("use_sliding_window", not config.architecture.startswith("Qwen"))
    slides = config.architecture not in WITHOUT_WINDOW and used and config.get("sliding_window")
    if set(kinds) != {"sliding_attention" if slides else "full_attention"}:
        raise _refused(config, "layer_types", "all layers of this architecture are of one kind")


def _refused(config: ModelConfig, name: str, why: str) -> ModelLoadError:
    value = str(config.get(name))
    return ModelLoadError(
        f"{name} of this {config.architecture} is "
        f"{value if len(value) < 60 else value[:57] + '...'}: {why}.",
        mend="a model without it, or remove the field if the weights do not follow it",
    )
