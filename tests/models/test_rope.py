"""Rotary tables against transformers, within and beyond the length a model was trained with."""

import json

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tokenry.errors import ModelLoadError
from tokenry.models.config import read_config
from tokenry.models.rope import rope_table

ORIGINAL = {"original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 4.0, 8.0], **ORIGINAL}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn-untruncated": {"rope_type": "yarn", "factor": 4.0, "truncate": False, **ORIGINAL},
    "yarn-mscale": {
        "rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, **ORIGINAL,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7, **ORIGINAL,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        **ORIGINAL,
    },
}  # fmt: skip


def llama(make, scaling, **fields):
    return make("LlamaConfig", rope_parameters={"rope_theta": 10000.0, **scaling}, **fields)


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaled_rope_agrees_beyond_the_original_length(name, make, same_as_transformers):
    same_as_transformers(*llama(make, SCALINGS[name]))  # prompts of 70 tokens, original length 32


def test_longrope_takes_the_long_factors_once_the_model_serves_more_than_the_original(
    make, drive, ask_transformers, prompts
):
    path, model = make(
        "Phi3Config", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **LONG},
        original_max_position_embeddings=32,
    )  # fmt: skip
    want, _ = ask_transformers(model, prompts[:1], 1)
    got, _ = drive(path).greedy(prompts[:1], 1)
    torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=1e-4)


def test_longrope_keeps_the_short_factors_if_the_model_serves_no_more_than_the_original(
    make, drive, ask_transformers, prompts
):
    path, model = make(
        "Phi3Config", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **LONG},
        original_max_position_embeddings=32,
    )  # fmt: skip
    short = [prompts[0][:30]]
    want, _ = ask_transformers(model, short, 1)
    got, _ = drive(path, max_model_len=32).greedy(short, 1)
    torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=1e-4)


def test_dynamic_ntk_agrees_for_a_text_of_the_longest_length(
    make, drive, ask_transformers, prompts
):
    path, model = llama(make, {"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=32)
    want, _ = ask_transformers(model, prompts[:1], 1)
    got, _ = drive(path, max_model_len=70).greedy(prompts[:1], 1)
    torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_fallback_fixes_the_frequencies_by_the_longest_length(
    make, drive, ask_transformers, prompts, kind
):
    own = {"factor": 4.0} if kind == "dynamic" else {**LONG, "factor": 4.0}
    path, model = make(
        "OlmoConfig", max_position_embeddings=32 if kind == "dynamic" else 128,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, **own},
    )  # fmt: skip
    driver = drive(path, max_model_len=70)
    assert driver.spec.notes
    want, _ = ask_transformers(model, prompts[:1], 1)
    for prompt in (prompts[0][:20], prompts[0]):  # a short text first must change nothing
        got, _ = driver.greedy([prompt], 1)
    torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=1e-4)


def test_the_table_holds_the_angles_of_transformers_at_far_positions():
    theirs = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, None)
    table = rope_table(theirs.rope_parameters, head_dim=64, max_len=100_001, trained_len=131072)
    at = torch.tensor([0, 1, 8191, 8192, 100_000])
    angles = at[:, None].float() * frequencies
    torch.testing.assert_close(table[at, 0], angles.cos(), atol=1e-2, rtol=0)
    torch.testing.assert_close(table[at, 1], angles.sin(), atol=1e-2, rtol=0)
    torch.testing.assert_close(table[:2, 1], angles[:2].sin(), atol=1e-6, rtol=0)


# ---- files written before transformers 5 -------------------------------------------------------

OLD = {
    "llama3": (
        "LlamaConfig",
        {"rope_theta": 10000.0, "rope_scaling": SCALINGS["llama3"]},
        {"rope_parameters": {"rope_theta": 10000.0, **SCALINGS["llama3"]}},
    ),
    "type": (
        "LlamaConfig",
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}},
    ),
    "no scaling": (
        "LlamaConfig",
        {"rope_theta": 5000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "layer_types": None,
        },
        {
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
    ),
    "phi3 su": (
        "Phi3Config",
        {
            "rope_theta": 1e4, "original_max_position_embeddings": 32,
            "rope_scaling": {
                "type": "su", "short_factor": LONG["short_factor"],
                "long_factor": LONG["long_factor"],
            },
        },
        {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG},
            "original_max_position_embeddings": 32,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_an_older_file_means_the_same(name, make, drive, ask_transformers, prompts):
    config_name, old, new = OLD[name]
    path, model = make(config_name, **new)
    raw = json.loads((path / "config.json").read_text())
    for field in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        raw.pop(field, None)
    (path / "config.json").write_text(json.dumps({**raw, **old}))
    want, _ = ask_transformers(model, prompts[:1], 1)
    got, _ = drive(path).greedy(prompts[:1], 1)
    torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=1e-4)


def test_an_unknown_scaling_is_an_error_that_names_the_known_ones(make, drive):
    path, _ = make("LlamaConfig")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"default"', '"spiral"'))
    with pytest.raises(ModelLoadError, match=r"'spiral'.*yarn"):
        drive(path)


def test_a_scaling_without_its_numbers_names_the_one_that_is_missing(make, drive):
    path, _ = make("LlamaConfig")
    config = path / "config.json"
    config.write_text(config.read_text().replace('"default"', '"llama3"'))
    with pytest.raises(ModelLoadError, match="original_max_position_embeddings"):
        drive(path)


def test_yarn_over_an_unchanged_length_serves_the_stretched_one(make):
    path, _ = llama(make, SCALINGS["yarn"], max_position_embeddings=32)
    assert read_config(path).max_len == 128
