"""generation_config.json: which fields count, which values mean nothing, what is told."""

import json

import pytest

from tokenry.errors import ModelLoadError
from tokenry.models.generation import sampling_defaults, told
from tokenry.params import SamplingParams, default_params


def write(path, **values):
    (path / "generation_config.json").write_text(json.dumps(values))
    return path


def test_the_fields_that_vllm_takes_count_and_no_others(tmp_path):
    path = write(
        tmp_path, temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05,
        max_new_tokens=512, do_sample=True, num_beams=4, eos_token_id=[1, 2],
    )  # fmt: skip
    found = sampling_defaults(path, "auto")
    assert found == {
        "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05,
        "max_tokens": 512,
    }  # fmt: skip
    (line,) = told(found)
    assert "temperature 0.6, top_p 0.95, top_k 20" in line
    assert "--generation-config none" in line


def test_values_that_are_written_without_meaning_anything_are_left_out(tmp_path):
    path = write(tmp_path, temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0)
    assert sampling_defaults(path, "auto") == {}
    assert told({}) == ()


def test_none_a_directory_or_a_file_may_be_chosen(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write(other, temperature=0.3)
    write(tmp_path, temperature=0.6)
    assert sampling_defaults(tmp_path, "none") == {}
    assert sampling_defaults(tmp_path, str(other)) == {"temperature": 0.3}
    assert sampling_defaults(tmp_path, str(other / "generation_config.json")) == {
        "temperature": 0.3
    }
    with pytest.raises(ModelLoadError, match="there is no"):
        sampling_defaults(tmp_path, str(tmp_path / "absent"))
    assert sampling_defaults(tmp_path / "nothing", "auto") == {}


def test_a_value_of_a_wrong_kind_is_named(tmp_path):
    with pytest.raises(ModelLoadError, match="top_k is '20', not a number"):
        sampling_defaults(write(tmp_path, top_k="20"), "auto")


def test_a_request_overrides_the_defaults_but_not_the_longest_answer():
    defaults = {"temperature": 0.6, "max_tokens": 100}
    assert default_params(defaults) == SamplingParams(temperature=0.6, max_tokens=100)
    assert default_params(defaults, temperature=0.0).greedy
    assert default_params(defaults, max_tokens=None).max_tokens == 100
    assert default_params(defaults, max_tokens=7).max_tokens == 7
    assert default_params(defaults, max_tokens=700).max_tokens == 100
    assert default_params({}) == SamplingParams()
