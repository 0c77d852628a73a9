"""Prompts that ask for the middle: the marks of each family, and models that have none."""

import json

import pytest
import tokenizers

from tokenry.hub import find_model
from tokenry.text.infill import Infill
from tokenry.text.tokenizer import Tokenizer

FAMILIES = {
    "qwen": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    "starcoder": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "code llama": ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    "deepseek": ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
}


def with_tokens(tmp_path, names):
    """The demo tokenizer with more special tokens, and no model beside it."""
    source = find_model("demo")
    core = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    core.add_special_tokens(list(names))
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_has_the_familys_marks_in_its_order(tmp_path, family):
    tokenizer = with_tokens(tmp_path, FAMILIES[family])
    infill = Infill.of(tokenizer)
    before, hole, middle = (tokenizer.core.token_to_id(name) for name in FAMILIES[family])
    assert infill.prompt([5, 6], [7], [0]) == [0, before, 5, 6, hole, 7, middle]


def test_where_the_suffix_comes_first(tmp_path):
    tokenizer = with_tokens(tmp_path, ("[SUFFIX]", "[PREFIX]"))
    suffix, prefix = (tokenizer.core.token_to_id(name) for name in ("[SUFFIX]", "[PREFIX]"))
    assert Infill.of(tokenizer).prompt([5, 6], [7]) == [suffix, 7, prefix, 5, 6]


def test_a_model_without_marks_cannot_fill_in():
    assert Infill.of(Tokenizer.load(find_model("demo"))) is None
