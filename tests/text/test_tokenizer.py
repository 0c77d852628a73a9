"""Encoding and decoding agree with transformers; what does not fit is refused."""

import json
import shutil

import pytest
from tokenizers.processors import TemplateProcessing

from tokenry.errors import ModelLoadError, RequestError
from tokenry.hub import find_model
from tokenry.text.tokenizer import Tokenizer

PROMPTS = [
    "once upon a time",
    "  two  spaces",
    "",
    "naïve 你好 🎉",
    "</s>once<|end|>",
    "king\n\nwas <s>",
]


def reference(path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_encodes_and_decodes_as_transformers(any_tokenizer, prompt, special):
    theirs = reference(any_tokenizer.path)
    ids = any_tokenizer.encode(prompt, add_special_tokens=special)
    assert ids == theirs.encode(prompt, add_special_tokens=special)
    assert any_tokenizer.decode(ids, skip_special_tokens=special) == theirs.decode(
        ids, skip_special_tokens=special
    )


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False},
        {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "add_bos_token": True},
        {"bos_token": "<s>", "pad_token": "<pad>", "add_bos_token": True},
        {"eos_token": "</s>", "extra_special_tokens": ["<|tool|>"]},
    ],
    ids=["named", "bos", "bos-eos", "no-bos", "dict", "new-pad", "extra"],
)
@pytest.mark.parametrize("post_processor", [False, True], ids=["bare", "post-processor"])
def test_special_tokens_around_a_prompt_as_transformers(
    core_of, save_core, tmp_path, config, post_processor
):
    core = core_of("sentencepiece")
    if post_processor:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = save_core(core, tmp_path, **config)
    ours, theirs = Tokenizer.load(path), reference(path)
    for prompt in [*PROMPTS, "once<|tool|>upon <pad>"]:
        assert ours.encode(prompt) == theirs.encode(prompt)
        ids = theirs.encode(prompt)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_demo_tokenizer_as_transformers(demo):
    theirs = reference(demo.path)
    text = "Once upon a time<|end|>, a fox — 狐 — said: “née”?\n\n  Yes."
    assert demo.encode(text) == theirs.encode(text)
    assert demo.decode(demo.encode(text)) == theirs.decode(
        theirs.encode(text), skip_special_tokens=True
    )
    assert demo.special_tokens["eos_token"] == theirs.eos_token


def test_end_tokens_come_from_every_file(core_of, save_core, tmp_path):
    path = save_core(core_of("sentencepiece"), tmp_path, eos_token="</s>")
    (path / "config.json").write_text(json.dumps({"eos_token_id": 7, "vocab_size": 500}))
    assert Tokenizer.load(path).eos_token_ids == (2, 7)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    loaded = Tokenizer.load(path)
    assert loaded.eos_token_ids == (2, 9)
    assert loaded.model_vocab_size == 500


def test_limits_of_the_tokenizer(core_of, save_core, tmp_path):
    path = save_core(core_of("metaspace"), tmp_path, model_max_length=1e30)
    assert Tokenizer.load(path).max_len is None
    save_core(core_of("metaspace"), tmp_path, model_max_length=2048)
    assert Tokenizer.load(path).max_len == 2048


def test_tokenizer_of_another_model_is_refused(demo):
    demo.check_matches(4096)
    with pytest.raises(ModelLoadError, match="does not match the model: 96 of its tokens"):
        demo.check_matches(4000)


def test_tokenizer_must_match_the_model_beside_it(core_of, save_core, tmp_path):
    path = save_core(core_of("sentencepiece"), tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 8}}))
    with pytest.raises(ModelLoadError, match="does not match"):
        Tokenizer.load(path, model_path=tmp_path)


def test_added_token_beyond_the_vocabulary_is_tolerated(core_of, save_core, tmp_path):
    core = core_of("sentencepiece")
    size = core.get_vocab_size()
    core.add_special_tokens(["<image>"])
    Tokenizer.load(save_core(core, tmp_path)).check_matches(size)


def test_token_text_and_bytes(demo, sentencepiece):
    ids = demo.encode("a fox ق")
    assert b"".join(demo.token_bytes(i) for i in ids).decode() == "a fox ق"
    king = sentencepiece.core.token_to_id("▁king")
    assert sentencepiece.token_text(king) == " king"
    assert sentencepiece.token_bytes(sentencepiece.core.token_to_id("<0xE4>")) == b"\xe4"


def test_text_that_is_no_unicode_is_a_bad_request(demo):
    with pytest.raises(RequestError, match="cannot be encoded"):
        demo.encode("half \ud83c a flag")


def test_directory_without_tokenizer(tmp_path):
    with pytest.raises(ModelLoadError, match="holds no tokenizer"):
        Tokenizer.load(tmp_path)


def test_damaged_files_are_named(tmp_path):
    shutil.copytree(
        find_model("demo"), tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")
    )
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json holds a list"):
        Tokenizer.load(tmp_path / "m")


def test_vocabulary_files_are_converted_through_transformers(tmp_path):
    pytest.importorskip("transformers")
    vocab = {"<|endoftext|>": 0, "a": 1, "b": 2, "Ġ": 3, "ab": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab b") == [4, 3, 2]
    assert tokenizer.decode([4, 3, 2]) == "ab b"
