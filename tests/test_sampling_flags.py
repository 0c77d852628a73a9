"""Sampling parameters as flags of `tokenry generate` and `tokenry chat`."""

import argparse

import msgspec
import pytest

from tokenry.cli import main
from tokenry.errors import RequestError
from tokenry.hub import find_model
from tokenry.params import SamplingParams
from tokenry.sampling_flags import NAMES, add_sampling_flags, given_sampling
from tokenry.text.tokenizer import Tokenizer


def parse(*argv):
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser, longest="as long as it likes")
    return given_sampling(parser.parse_args(argv))


def test_only_what_was_given_is_given():
    assert parse() == {}
    got = parse("--top-k", "5", "--dry-multiplier", "0.8", "--temperature", "0")
    assert got == {"top_k": 5, "dry_multiplier": 0.8, "temperature": 0.0}


def test_every_flag_is_a_parameter_of_its_kind():
    kinds = {field.name: field.type for field in msgspec.structs.fields(SamplingParams)}
    for name in NAMES:
        assert name in kinds
        flag = "--" + name.replace("_", "-")
        assert list(parse(flag, "2" if name == "mirostat" else "1")) == [name]


def test_a_wrong_value_is_named_before_a_model_is_loaded(capsys):
    with pytest.raises(RequestError, match="mirostat must be 0"):
        parse("--mirostat", "1")
    assert main(["generate", "no-such-model", "x", "--typical-p", "7"]) == 1
    assert "typical_p must be in" in capsys.readouterr().err


def test_generate_obeys_the_flags(capfd):
    command = ["generate", "demo", "Once upon", "--backend", "cpu", "--kv-cache-bytes", "32MiB"]
    command += ["--quiet", "--max-tokens", "24", "--temperature", "0"]
    assert main([*command, "--no-repeat-ngram-size", "1"]) == 0
    text = capfd.readouterr().out.removesuffix("\n")
    ids = Tokenizer.load(find_model("demo")).encode(text, add_special_tokens=False)
    assert len(ids) == len(set(ids)) > 20  # without the flag commas come again
