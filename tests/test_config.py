"""Flags, file and environment: a wrong name or value is one error that names it."""

from __future__ import annotations

import pytest

from tokenry.config import EngineConfig, ServerConfig, load
from tokenry.errors import ConfigError


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_mistyped_variable_is_refused_with_the_nearest_name(cls):
    environ = {"TOKENRY_MODEL": "demo", "TOKENRY_MAX_MODEL_LENN": "64", "TOKEN": "x"}
    with pytest.raises(ConfigError) as caught:
        load(cls, {}, environ=environ)
    assert "TOKENRY_MAX_MODEL_LENN" in caught.value.message
    assert "TOKENRY_MAX_MODEL_LEN" in caught.value.mend


def test_variables_of_either_config_are_known_to_both():
    environ = {"TOKENRY_MODEL": "demo", "TOKENRY_PORT": "9", "TOKENRY_MAX_MODEL_LEN": "1k"}
    assert load(EngineConfig, {}, environ=environ).max_model_len == 1000
    assert load(ServerConfig, {}, environ=environ).port == 9


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("max_body_bytes", 0),
        ("max_queue", -1),
        ("keep_alive_s", 0),
        ("keep_alive_s", -1),
        ("keep_alive_s", "nan"),
        ("keep_alive_s", "inf"),
        ("drain_timeout_s", -0.5),
        ("drain_timeout_s", "nan"),
    ],
)
def test_server_value_that_cannot_be_used_is_refused_and_its_flag_named(name, value):
    with pytest.raises(ConfigError) as caught:
        load(ServerConfig, {name: value}, environ={})
    assert name in caught.value.message
    assert "--" + name.replace("_", "-") in caught.value.mend


@pytest.mark.parametrize("value", ["infk", "1e999", "nan", "-inf", "k", "1.5"])
def test_size_that_is_no_number_is_one_error(value):
    with pytest.raises(ConfigError, match="--max-model-len"):
        load(EngineConfig, {"model": "demo", "max_model_len": value}, environ={})


def test_negative_device_is_refused():
    with pytest.raises(ConfigError, match="device_index"):
        load(EngineConfig, {"model": "demo", "device_index": -1}, environ={})


def test_no_quantization_is_none_however_it_is_said():
    assert load(EngineConfig, {"model": "m", "quantization": None}).quantization is None
    assert load(EngineConfig, {"model": "m", "quantization": "int4"}).quantization == "int4"
    with pytest.raises(ConfigError, match="'int5' is not one of int8, int4"):
        load(EngineConfig, {"model": "m", "quantization": "int5"})
