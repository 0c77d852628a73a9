"""config.json and generation_config.json."""

import json

import pytest
import transformers

from tokenry.backend.contract import Caps
from tokenry.errors import ModelLoadError, TokenryError
from tokenry.models.config import read_config
from tokenry.models.registry import load_spec, pick_dtype

MINIMAL = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 64,
    "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def put(raw, generation=None):
        (tmp_path / "config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return put


def test_what_a_short_file_leaves_out_has_the_usual_value(write):
    config = read_config(write(MINIMAL))
    assert (config.num_kv_heads, config.head_dim, config.dtype, config.tied) == (
        4, 8, "float32", False,
    )  # fmt: skip
    assert config.rope == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.eos_token_ids == ()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.mend


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{'not': json}", r"config\.json"),
        ("[1, 2]", r"config\.json.*list"),
        (json.dumps({**MINIMAL, "architectures": []}), r"config\.json.*architecture"),
        (json.dumps({k: v for k, v in MINIMAL.items() if k != "architectures"}), "architecture"),
        (json.dumps({k: v for k, v in MINIMAL.items() if k != "vocab_size"}), "vocab_size"),
        (json.dumps({**MINIMAL, "num_attention_heads": "four"}), "num_attention_heads"),
        (json.dumps({**MINIMAL, "hidden_size": 0}), "hidden_size"),
        (json.dumps({**MINIMAL, "num_attention_heads": 0}), "num_attention_heads"),
    ],
    ids=[
        "no json",
        "a list",
        "no architecture",
        "none at all",
        "no vocab",
        "a word",
        "0",
        "0 heads",
    ],
)
def test_a_malformed_file_is_an_error_that_names_the_field_and_a_mend(write, content, says):
    with pytest.raises(ModelLoadError, match=says) as caught:
        read_config(write(content))
    assert caught.value.mend


@pytest.mark.parametrize(
    ("field", "generation", "ids"),
    [
        (4, None, (4,)),
        ([4, 5], None, (4, 5)),
        (4, {"eos_token_id": [7, 4]}, (7, 4)),
        (None, {"eos_token_id": 9}, (9,)),
        (4, {"do_sample": True}, (4,)),
        (4, {"eos_token_id": None}, (4,)),
        (None, None, ()),
    ],
)
def test_end_tokens_come_from_both_files(write, field, generation, ids):
    path = write({**MINIMAL, "eos_token_id": field}, generation)
    assert set(read_config(path).eos_token_ids) == set(ids)


def test_a_malformed_generation_config_is_named(write):
    path = write(MINIMAL)
    (path / "generation_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        read_config(path)


def test_a_composite_models_text_part_is_the_config(write):
    text = {k: v for k, v in MINIMAL.items() if k != "architectures"}
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "eos_token_id": 1,
    }
    config = read_config(write(raw))
    assert (config.hidden_size, config.eos_token_ids) == (32, (1,))


@pytest.mark.parametrize(
    ("field", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({}, "float32"),
    ],
    ids=str,
)
def test_the_checkpoints_dtype_is_found_under_either_name(write, field, dtype):
    assert read_config(write({**MINIMAL, **field})).dtype == dtype


@pytest.mark.parametrize(
    ("wanted", "checkpoint", "has", "picked"),
    [
        ("auto", "bfloat16", ("float32", "bfloat16"), "float32"),
        ("auto", "bfloat16", ("bfloat16", "float16"), "bfloat16"),
        ("auto", "float16", ("bfloat16", "float16"), "float16"),
        ("auto", "float16", ("bfloat16",), "bfloat16"),
        ("bfloat16", "float32", ("float32", "bfloat16"), "bfloat16"),
    ],
)
def test_the_dtype_is_the_checkpoints_where_the_device_has_it(wanted, checkpoint, has, picked):
    assert pick_dtype(wanted, checkpoint, Caps(dtypes=has)) == picked


def test_a_dtype_that_the_device_lacks_is_an_error_with_those_it_has():
    with pytest.raises(TokenryError, match="float32, bfloat16"):
        pick_dtype("float16", "float32", Caps(dtypes=("float32", "bfloat16")))


@pytest.mark.parametrize("asked", [None, 100, 256])
def test_the_context_is_the_configs_or_what_is_asked_for(write, asked):
    spec = load_spec(write(MINIMAL), dtype="float32", max_model_len=asked)
    assert spec.max_model_len == (asked or 256)


def test_more_context_than_the_model_was_made_for_is_noted(write):
    spec = load_spec(write(MINIMAL), dtype="float32", max_model_len=512)
    assert spec.max_model_len == 512
    assert "512 is beyond the 256" in spec.notes[0]


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "StableLmForCausalLM"])
def test_more_context_than_there_are_learned_positions_is_refused(write, architecture):
    path = write({**MINIMAL, "architectures": [architecture]})
    with pytest.raises(ModelLoadError, match=r"256 positions, 512") as caught:
        load_spec(path, dtype="float32", max_model_len=512)
    assert caught.value.mend == "--max-model-len 256"


@pytest.mark.parametrize(
    ("config_name", "own"),
    [
        (
            "Gemma3TextConfig",
            {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        ),
        ("MistralConfig", {"hidden_size": 4096}),
        ("Qwen3Config", {"hidden_size": 1024, "num_attention_heads": 16}),
        ("Gemma2Config", {"hidden_size": 2304}),
    ],
)
def test_a_file_without_its_familys_defaults_means_what_transformers_says(write, config_name, own):
    theirs = getattr(transformers, config_name)(**own)
    full = {k: getattr(theirs, k) for k in MINIMAL if k != "architectures"}
    silent = full if config_name != "Gemma3TextConfig" else own
    raw = {"architectures": ["X"], "model_type": theirs.model_type, **silent}
    config = read_config(write(raw))
    assert config.head_dim == (getattr(theirs, "head_dim", None) or config.head_dim)
    assert (config.num_heads, config.vocab_size) == (theirs.num_attention_heads, theirs.vocab_size)
    if config_name != "Qwen3Config":  # its window is off by default
        assert config.get("sliding_window") == theirs.sliding_window
