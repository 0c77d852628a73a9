"""Fields of a config.json that change what a model computes: honoured as transformers does, or
refused; none is passed over in silence.
"""

import json

import pytest
import torch

from tokenry.errors import ModelLoadError
from tokenry.models.registry import load_spec

WINDOW = {"sliding_window": 24}
SLIDING, FULL = "sliding_attention", "full_attention"
HONOURED = {
    "gpt2-erf": ("GPT2Config", {"activation_function": "gelu"}),
    "gpt2-silu": ("GPT2Config", {"activation_function": "silu"}),
    "gpt2-inverse-layer": ("GPT2Config", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-unscaled": ("GPT2Config", {"scale_attn_weights": False}),
    "llama-gelu": ("LlamaConfig", {"hidden_act": "gelu"}),
    "gemma2-erf": ("Gemma2Config", {"head_dim": 16, **WINDOW, "hidden_activation": "gelu"}),
    "qwen3-moe-window": (
        "Qwen3MoeConfig",
        {
            "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "num_experts_per_tok": 2,
            **WINDOW, "use_sliding_window": True, "max_window_layers": 1,
        },
    ),
    "qwen3-window": (
        "Qwen3Config", {"head_dim": 16, **WINDOW, "use_sliding_window": True,
                        "layer_types": [SLIDING, FULL]},
    ),
    "mixtral-window": (
        "MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW},
    ),
    "phi3-window": ("Phi3Config", WINDOW),
}  # fmt: skip


@pytest.mark.parametrize("name", HONOURED)
def test_a_field_changes_what_is_computed_as_in_transformers(name, make, same_as_transformers):
    config_name, fields = HONOURED[name]
    assert same_as_transformers(*make(config_name, **fields)).spec.notes == ()


def change(path, *, drop=(), **fields):
    file = path / "config.json"
    raw = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))


REFUSED = {
    "llama-relu": ("LlamaConfig", {"hidden_act": "relu"}, "hidden_act 'relu'.*silu, "),
    "gpt2-relu": ("GPT2Config", {"activation_function": "relu"}, "activation_function 'relu'"),
    "gemma2-relu": ("Gemma2Config", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
    "gpt2-cross": ("GPT2Config", {"add_cross_attention": True}, "add_cross_attention"),
    "gemma3-bidirectional": (
        "Gemma3TextConfig", {"use_bidirectional_attention": True}, "use_bidirectional_attention",
    ),
    "qwen2-embedding": ("Qwen2Config", {"is_causal": False}, "is_causal"),
    "llama-mixed-layers": (
        "LlamaConfig", {"layer_types": [SLIDING, FULL], "sliding_window": 8}, "layer_types",
    ),
    "mistral-mixed-layers": ("MistralConfig", {"layer_types": [SLIDING, FULL]}, "layer_types"),
    "qwen3-strange-layers": (
        "Qwen3Config", {"layer_types": ["linear_attention", FULL]}, "linear_attention",
    ),
    "gemma2-too-few-layers": ("Gemma2Config", {"layer_types": [FULL]}, "layer_types.*2 layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(name, make):
    config_name, fields, says = REFUSED[name]
    path, _ = make(config_name)
    change(path, **fields)
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_spec(path, dtype="float32")
    assert caught.value.mend


@pytest.mark.parametrize(
    ("config_name", "fields", "field"),
    [
        ("Gemma2Config", {"head_dim": 16, **WINDOW}, "attn_logit_softcapping"),
        ("Gemma2Config", {"head_dim": 16, **WINDOW}, "final_logit_softcapping"),
        ("Gemma2Config", {"head_dim": 16, **WINDOW}, "hidden_activation"),
        ("GPT2Config", {}, "activation_function"),
    ],
)
def test_a_field_left_out_has_transformers_default(
    config_name, fields, field, make, drive, prompts
):
    path, _ = make(config_name, **fields)
    want, _ = drive(path).greedy(prompts, 1)
    change(path, drop=(field,))
    got, _ = drive(path).greedy(prompts, 1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_missing_number_of_experts_is_named(make):
    path, _ = make("Qwen3MoeConfig", num_experts=4, moe_intermediate_size=24, head_dim=16)
    change(path, moe_intermediate_size=None)
    with pytest.raises(ModelLoadError, match="moe_intermediate_size"):
        load_spec(path, dtype="float32")


def test_a_window_that_llama_does_not_have_is_passed_over_with_a_note(make, drive, prompts):
    path, _ = make("LlamaConfig")
    want, _ = drive(path).greedy(prompts, 1)
    change(path, sliding_window=8)
    driver = drive(path)
    assert driver.spec.notes == (
        "sliding_window 8 of config.json is passed over: LlamaForCausalLM has no window",
    )
    got, _ = driver.greedy(prompts, 1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("config_name", ["LlamaConfig", "GPT2Config"])
def test_another_head_than_the_tied_one_is_an_error(config_name, make, edit, drive):
    path, _ = make(config_name, tie_word_embeddings=True)
    edit(path, add={"lm_head.weight": torch.ones(160, 32)})
    with pytest.raises(ModelLoadError, match="tie_word_embeddings"):
        drive(path)
