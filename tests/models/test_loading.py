"""Weights from disk: what loads, and the error for each thing that can be wrong."""

import json
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tokenry.backend.contract import Caps
from tokenry.backend.ops import OpTable
from tokenry.errors import ModelLoadError
from tokenry.models.registry import load_spec
from tokenry.models.weights import dummy_weights, stream_weights, weight_bytes

DEMO = Path(__file__).parents[2] / "demo" / "tokenry_demo" / "tales_4m"
A_WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def llama(make):
    return make("LlamaConfig")[0]


@pytest.fixture
def shard(llama):
    """The model in three files with an index."""
    tensors = load_file(llama / "model.safetensors")
    table = {}
    for i, name in enumerate(sorted(tensors)):
        table[name] = f"model-{i % 3 + 1:05}-of-00003.safetensors"
    for file in set(table.values()):
        save_file({n: t.clone() for n, t in tensors.items() if table[n] == file}, llama / file)
    (llama / "model.safetensors").unlink()
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return llama, table


def load(path):
    spec = load_spec(path, dtype="float32")
    return spec.torch_step(spec.weights(lambda share: None), OpTable(), Caps())


# ---- what loads ----------------------------------------------------------------------------------


def test_shards_hold_the_same_model_as_one_file(shard, make, drive, prompts):
    path, _ = shard
    sharded, _ = drive(path).greedy(prompts, 2)
    for file in path.glob("*.safetensors*"):
        file.unlink()
    make("LlamaConfig")  # the same random model again, in one file
    whole, _ = drive(path).greedy(prompts, 2)
    assert all(torch.equal(a, b) for a, b in zip(sharded, whole, strict=True))


def test_progress_rises_to_one(shard):
    shares = []
    assert len(list(stream_weights(shard[0], shares.append))) == len(shard[1])
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert 0 < shares[0] < 0.5


def test_weight_bytes_are_those_of_all_tensors(llama, shard):
    tensors = dict(stream_weights(llama))
    assert weight_bytes(llama) == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_runs_in_float32(dtype, make, drive, ask_transformers, prompts):
    path, model = make("LlamaConfig")
    model.to(dtype).save_pretrained(path)
    wide = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    want, tokens = ask_transformers(wide, prompts[:1], 8)
    driver = drive(path)
    logits, got = driver.greedy(prompts[:1], 8)
    torch.testing.assert_close(logits[0], want[0], atol=1e-4, rtol=1e-4)
    assert got == tokens
    assert driver.spec.weight_bytes == weight_bytes(path)  # a backend may keep 16 bits


def test_a_model_runs_in_half_precision(make, drive, ask_transformers, prompts, backend):
    path, model = make("Gemma2Config", head_dim=16, sliding_window=24, initializer_range=0.05)
    want, _ = ask_transformers(model, prompts[:1], 1)
    logits, _ = drive(path, backend, dtype="bfloat16").greedy(prompts[:1], 1)
    assert torch.nn.functional.cosine_similarity(logits[0], want[0]).min() > 0.99


def test_dummy_weights_need_no_file_and_are_the_same_each_time(llama, drive, prompts):
    (llama / "model.safetensors").unlink()
    one, _ = drive(llama, dummy=True).greedy(prompts, 2)
    two, _ = drive(llama, dummy=True).greedy(prompts, 2)
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("family", ["GPT2Config", "MixtralConfig", "Gemma2Config", "Phi3Config"])
def test_every_kind_of_layer_takes_dummy_weights(family, make, drive):
    path, _ = make(family)
    (path / "model.safetensors").unlink()
    logits, _ = drive(path, dummy=True).greedy([[5, 6, 7]], 2)
    assert logits[0].isfinite().all()


def test_dummy_scales_are_one_and_biases_zero():
    made = dict(dummy_weights({"norm.weight": (4,), "q.bias": (4,), "q.weight": (4, 4)}, "float32"))
    assert made["norm.weight"].eq(1).all()
    assert made["q.bias"].eq(0).all()
    assert 0 < made["q.weight"].abs().max() < 1


def test_tensors_that_old_checkpoints_carry_are_passed_over(llama, edit, drive):
    edit(llama, add={
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.rotary_emb.inv_freq": torch.ones(4),
    })  # fmt: skip
    assert drive(llama).greedy([[5]], 1)


def test_gpt2s_masks_are_passed_over_and_the_prefix_may_be_missing(make, drive, edit, prompts):
    path, _ = make("GPT2Config")
    want, _ = drive(path).greedy(prompts, 2)
    file = path / "model.safetensors"
    bare = {k.removeprefix("transformer."): v.clone() for k, v in load_file(file).items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, file)
    got, _ = drive(path).greedy(prompts, 2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_tied_head_that_is_stored_as_well_is_passed_over(make, edit, drive):
    path, model = make("LlamaConfig", tie_word_embeddings=True)
    want, _ = drive(path).greedy([[5, 6]], 2)
    edit(path, add={"lm_head.weight": model.lm_head.weight.detach().clone()})
    got, _ = drive(path).greedy([[5, 6]], 2)
    assert torch.equal(got[0], want[0])


def test_the_demo_model_speaks_as_in_transformers(drive, backend, ask_transformers):
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    texts = ("Once upon a time, a little fox", "The king")
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    _, want = ask_transformers(model, prompts, 24)
    driver = drive(DEMO, backend)
    _, got = driver.greedy(prompts, 24)
    assert got == want
    assert driver.spec.eos_token_ids == (4,)


# ---- what is wrong -------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(llama, edit):
    edit(llama, drop=[A_WEIGHT])
    with pytest.raises(ModelLoadError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj") as caught:
        load(llama)
    assert str(llama) in caught.value.message
    assert caught.value.mend


def test_a_tensor_too_many_is_named_with_its_file(llama, edit):
    edit(llama, add={"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)})
    with pytest.raises(ModelLoadError, match=r"model\.safetensors.*layers\.7\.mlp") as caught:
        load(llama)
    assert caught.value.mend


def test_a_tensor_of_another_shape_is_named_with_both_shapes(llama, edit):
    edit(llama, add={A_WEIGHT: torch.ones(40, 32)})
    with pytest.raises(
        ModelLoadError, match=r"model\.safetensors.*up_proj.*\[40, 32\].*\[48, 32\]"
    ):
        load(llama)


def test_a_bias_that_the_config_does_not_have_is_an_error(llama, edit):
    edit(llama, add={"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    with pytest.raises(ModelLoadError, match=r"q_proj\.bias"):
        load(llama)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_with_their_file(llama, edit, value):
    bad = torch.zeros(48, 32)
    bad[3, 5] = value
    edit(llama, add={A_WEIGHT: bad})
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: .*up_proj.*NaN or infinite"):
        load(llama)


@pytest.mark.parametrize("keep", [0, 5, 100, 10_000], ids=["empty", "length", "header", "data"])
def test_a_file_that_is_cut_short_is_named_with_its_size(llama, keep):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=rf"model\.safetensors.*{keep} bytes") as caught:
        load(llama)
    assert "again" in (caught.value.mend or "")


def test_a_file_of_something_else_is_no_safetensors_file(llama):
    (llama / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"version https://git-lfs")
    with pytest.raises(ModelLoadError, match=r"model\.safetensors.*no safetensors file"):
        load(llama)


def test_a_missing_shard_is_named(shard):
    path, _ = shard
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"1 of 3 weight files: model-00002-of-00003"):
        load(path)


def test_a_shard_without_a_tensor_that_the_index_promises_is_named(shard):
    path, table = shard
    index = {"weight_map": {**table, "model.layers.9.x": "model-00001-of-00003.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"model-00001-of-00003.*layers\.9\.x"):
        load(path)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": {}}'])
def test_a_broken_index_is_named(shard, content):
    path, _ = shard
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors\.index\.json"):
        load(path)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin") as caught:
        load(llama)
    assert "save_pretrained" in (caught.value.mend or "")


def test_no_weights_at_all_is_an_error(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no \*\.safetensors") as caught:
        load(llama)
    assert "dummy" in (caught.value.mend or "")


def test_the_fallback_names_a_broken_file_too(make):
    path, _ = make("StableLmConfig")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors.*10000 bytes"):
        load_spec(path, dtype="float32")
