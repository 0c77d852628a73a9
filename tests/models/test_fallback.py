"""Architectures that only transformers knows."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from tokenry.backend.contract import Caps
from tokenry.backend.ops import OpTable
from tokenry.errors import ModelLoadError, UnknownArchitecture, Unsupported
from tokenry.models.registry import load_spec

MODELS = {
    "stablelm": ("StableLmConfig", {}),
    "starcoder2-window": ("Starcoder2Config", {"sliding_window": 24}),
    "olmo": ("OlmoConfig", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.5}),
    "gpt-neox": ("GPTNeoXConfig", {"num_key_value_heads": 4}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_only_transformers_knows_computes_the_same(name, make, same_as_transformers):
    config_name, fields = MODELS[name]
    driver = same_as_transformers(*make(config_name, **fields))
    architecture = driver.spec.architecture
    assert driver.spec.notes == (f"{architecture} runs through the transformers fallback",)


def test_the_fallback_has_no_linear_of_torch_left(make, drive):
    path, _ = make("StableLmConfig")
    driver = drive(path)
    per_layer = 7  # q, k, v, o, gate, up, down
    assert driver.ops.fallbacks["linear"] == 2 * per_layer + 1


def test_the_fallback_makes_dummy_weights(make, drive):
    path, _ = make("StableLmConfig")
    (path / "model.safetensors").unlink()
    driver = drive(path, dummy=True)
    logits, _ = driver.greedy([[5, 6, 7]], 2)
    assert logits[0].isfinite().all()
    assert driver.spec.weight_bytes == 0


def test_without_transformers_the_error_says_how_to_get_it(make, monkeypatch):
    path, _ = make("StableLmConfig")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelLoadError, match="StableLmForCausalLM") as caught:
        load_spec(path, dtype="float32")
    assert caught.value.mend == 'pip install "tokenry[hf]"'


def test_an_unknown_architecture_is_answered_with_the_known_ones(make):
    path, _ = make("LlamaConfig")
    config = path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LamaForCausalLM"))
    with pytest.raises(UnknownArchitecture, match="LamaForCausalLM") as caught:
        load_spec(path, dtype="float32")
    assert "Qwen3ForCausalLM" in caught.value.message


def test_a_model_without_positions_is_refused(make):
    path, _ = make("BloomConfig", n_layer=2, n_head=4)
    with pytest.raises(UnknownArchitecture, match="positions"):
        load_spec(path, dtype="float32")


def test_a_model_with_sinks_in_its_attention_is_refused_in_the_first_step(make, drive):
    path, _ = make("GptOssConfig", head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    driver = drive(path)
    driver.open(1, 4)
    with pytest.raises(Unsupported, match="s_aux"):
        driver.run([(0, [5, 6], 0)])


def test_a_tensor_that_the_checkpoint_lacks_is_named_and_never_made_up(make, edit, drive):
    path, _ = make("StableLmConfig")
    edit(path, drop=["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(
        ModelLoadError, match=r"lacks 1 tensors .*layers\.0\.self_attn\.q_proj\.weight"
    ):
        drive(path)


def test_a_tensor_of_another_shape_is_named(make, edit, drive):
    path, _ = make("StableLmConfig")
    edit(path, add={"model.layers.1.mlp.up_proj.weight": torch.zeros(40, 32)})
    with pytest.raises(ModelLoadError, match=r"up_proj\.weight has shape \[40, 32\].*\[48, 32\]"):
        drive(path)


def test_a_tensor_with_nan_is_named(make, edit, drive):
    path, _ = make("StableLmConfig")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(path / "model.safetensors")[name].clone()
    weight[3, 3] = torch.nan
    edit(path, add={name: weight})
    with pytest.raises(ModelLoadError, match=rf"model\.safetensors: {name} holds NaN"):
        drive(path)


def test_tied_weights_are_not_missed(make, drive):
    path, _ = make("StableLmConfig", tie_word_embeddings=True)
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"]
    assert drive(path).greedy([[5, 6, 7]], 2)[0][0].isfinite().all()


def test_loading_shows_our_progress_and_no_bar_of_transformers(make, capfd):
    import transformers

    path, _ = make("StableLmConfig")
    spec = load_spec(path, dtype="float32")
    shares: list[float] = []
    capfd.readouterr()
    transformers.utils.logging.enable_progress_bar()
    try:
        spec.torch_step(spec.weights(shares.append), OpTable(), Caps())
        assert transformers.utils.logging.is_progress_bar_enabled(), (
            "the user's setting was changed"
        )
    finally:
        transformers.utils.logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")
    assert len(shares) > 10 and shares == sorted(shares) and shares[-1] == 1.0
