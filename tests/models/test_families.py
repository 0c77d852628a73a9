"""Every family against transformers, on the reference ops and on the CPU's kernels."""

import pytest
import torch
import transformers

WINDOW = {"sliding_window": 24}
QUERY = {"query_pre_attn_scalar": 20}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
EXPERTS = {"num_experts_per_tok": 2}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("LlamaConfig", {"head_dim": 32, "num_key_value_heads": 1}),
    "mistral-window": ("MistralConfig", WINDOW),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": (
        "Qwen2Config",
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, **WINDOW, **QUERY}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, **WINDOW, **QUERY, **MIXED}),
    "phi3": ("Phi3Config", {}),
    "phi3-partial": (
        "Phi3Config",
        {
            "rope_parameters": {
                "rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5,
            }
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
            "residual_multiplier": 0.5, "logits_scaling": 2.0,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, **EXPERTS}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, **EXPERTS,
            "norm_topk_prob": True, "mlp_only_layers": [0],
        },
    ),
    "qwen3-moe-raw-gates": (
        "Qwen3MoeConfig",
        {
            "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, **EXPERTS,
            "norm_topk_prob": False,
        },
    ),
    "gpt2": ("GPT2Config", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_family_computes_what_transformers_computes(name, make, same_as_transformers):
    config_name, fields = MODELS[name]
    driver = same_as_transformers(*make(config_name, **fields))
    assert driver.spec.notes == ()  # natively, not through the fallback


TEXT = {
    "vocab_size": 160, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 24,
    "query_pre_attn_scalar": 20, "initializer_range": 0.15, "max_position_embeddings": 128,
    **MIXED,
}  # fmt: skip


def test_a_composite_gemma3_is_served_as_its_text_model(tmp_path, drive, ask_transformers, prompts):
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(1)
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=vision, mm_tokens_per_image=4, image_token_index=159,
        boi_token_index=158, eoi_token_index=157,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    model.save_pretrained(tmp_path)
    prompts = [[token % 150 for token in prompt] for prompt in prompts]  # no image tokens
    want, tokens = ask_transformers(model, prompts, 4)
    driver = drive(tmp_path)
    logits, got = driver.greedy(prompts, 4)
    for a, b in zip(logits, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert got == tokens
    assert driver.spec.notes == (
        "Gemma3ForConditionalGeneration is served as a text model, without images",
    )
