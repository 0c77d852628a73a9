"""Frozen configuration, and the only reader of the environment.

In: flags, a YAML file, TOKENRY_* variables (in this order of precedence), or keyword arguments.
Out: `EngineConfig` and `ServerConfig`, whole at birth; a wrong name or value is a `ConfigError`
that names it. Each field's help text is its metadata, so the command line, the file, the
environment and the reference page are one list. Nobody changes a config after `assemble`: what a
device needs otherwise is a `Change`, applied once and printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from tokenry.errors import ConfigError

ENV_PREFIX = "TOKENRY_"
C = TypeVar("C", "EngineConfig", "ServerConfig")


def _f(help: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What to load, on what, within which limits."""

    model: str = _f("directory, hub id, or a name that an installed package provides ('demo')")
    tokenizer: str | None = _f(
        "directory or hub id of the tokenizer, if it is not the model's", None
    )
    revision: str | None = _f("hub revision of the model", None)
    trust_remote_code: bool = _f("let transformers run code from the model's repository", False)
    backend: str | None = _f("backend to use; without it the one with the highest score", None)
    device_index: int = _f("which device of the backend", 0)
    backend_option: tuple[str, ...] = _f(
        "key=value for the backend, may be given more than once", ()
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = _f(
        "model dtype; auto: the checkpoint's if the backend has it, else the backend's preferred",
        "auto",
    )
    load_format: Literal["auto", "safetensors", "dummy"] = _f(
        "dummy: random weights of the right shapes, for benchmarks; auto and safetensors are one: "
        "no other files are read",
        "auto",
    )
    max_model_len: int | None = _f(
        "most tokens of a request, prompt and answer; without it the model's own, fitted to memory",
        None,
    )
    quantization: Literal["int8", "int4"] | None = _f(
        "weights are quantised while they are loaded: 8 bits per channel, or 4 in groups", None
    )
    max_num_seqs: int = _f("most requests in one step", 128)
    max_num_batched_tokens: int = _f("token budget of one step", 2048)
    memory_fraction: float = _f("share of the device's memory that weights and KV may take", 0.9)
    kv_cache_bytes: int | None = _f(
        "bytes for the KV cache, instead of what memory_fraction leaves", None
    )
    num_kv_blocks: int | None = _f(
        "number of KV blocks, instead of what memory allows (for tests)", None
    )
    block_size: int | None = _f("tokens per KV block; without it the backend's preferred", None)
    enable_prefix_caching: bool = _f("share the KV of equal prompt beginnings", True)
    enable_chunked_prefill: bool = _f("let a long prompt take several steps", True)
    scheduling_policy: Literal["fcfs", "priority"] = _f("who is first in the queue", "fcfs")
    overlap: bool = _f("plan step N+1 while step N runs", True)
    enforce_eager: bool = _f(
        "run without captured or compiled programs (not on static devices)", False
    )
    warmup: bool = _f("execute every program once before serving", True)
    bucket_strategy: Literal["auto", "exponential", "linear", "padding-aware"] = _f(
        "how the sizes of compiled or captured programs are spaced; auto: as the bucket file says, "
        "else exponential",
        "auto",
    )
    bucket_axis: tuple[str, ...] = _f(
        "AXIS=MIN:STEP:MAX or AXIS=VALUE,VALUE,... for one axis of the buckets (prefill.seqs, "
        "prefill.tokens, prefill.kv_blocks, decode.seqs, decode.kv_blocks), may be given more "
        "than once",
        (),
    )
    bucket_file: str | None = _f("YAML file with bucket settings, see `tokenry buckets`", None)
    max_programs: int | None = _f(
        "most compiled or captured programs; without it as many as the backend allows", None
    )
    record_steps: str | None = _f(
        "append the shape of every step to this file, for `tokenry buckets`", None
    )
    seed: int = _f("seeds the requests that bring no seed of their own", 0)

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_num_seqs", "max_num_batched_tokens")
        _at_least(self, 0, "device_index")
        sizes = ("max_model_len", "kv_cache_bytes", "num_kv_blocks", "block_size", "max_programs")
        _at_least(self, 1, *sizes)
        if not 0 < self.memory_fraction <= 1:
            raise ConfigError(
                f"memory_fraction is {self.memory_fraction}, it must lie in (0, 1].",
                mend=f"{flag_of('memory_fraction')} 0.9",
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}): not every request could get a token in a step.",
                mend=f"--max-num-seqs {self.max_num_batched_tokens}, "
                "or a larger --max-num-batched-tokens",
            )
        for option in self.backend_option:
            if "=" not in option:
                raise ConfigError(
                    f"--backend-option {option!r} is not key=value.",
                    mend="--backend-option key=value",
                )

    @property
    def backend_options(self) -> dict[str, str]:
        """The backend's own options as a mapping."""
        return dict(option.split("=", 1) for option in self.backend_option)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the HTTP process serves."""

    host: str = _f("address to listen on", "127.0.0.1")
    port: int = _f("port to listen on, 0 takes a free one", 8000)
    served_model_name: tuple[str, ...] = _f(
        "name(s) that requests may use; without it the model as given", ()
    )
    api_key: tuple[str, ...] = _f("key(s) that requests must bring as a bearer token", ())
    chat_template: str | None = _f(
        "file with a Jinja chat template, instead of the tokenizer's", None
    )
    max_body_bytes: int = _f("largest request body", 32 * 2**20)
    max_waiting: int = _f(
        "requests that may wait for the engine; one more is answered with 503", 4096
    )
    keep_alive_s: float = _f("seconds of silence after which a stream carries a comment line", 15.0)
    drain_timeout_s: float = _f("seconds that running requests get at shutdown", 30.0)
    heartbeat_timeout_s: float = _f("seconds of an engine's silence that /readyz tells", 30.0)
    step_timeout_s: float = _f("seconds of one step (it may compile) that /readyz tells", 600.0)
    strict_params: bool = _f(
        "answer unknown request fields with 400 (otherwise a header names them)", False
    )
    log_level: Literal["debug", "info", "warning", "error"] = _f("how much is logged", "info")
    log_prompts: bool = _f("each request's prompt in its line of the log, not only counts", False)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}, it must lie in 0..65535.", mend="--port 8000")
        _at_least(self, 1, "max_body_bytes")
        _at_least(self, 0, "max_waiting", "drain_timeout_s")
        for name in ("keep_alive_s", "heartbeat_timeout_s", "step_timeout_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(
                    f"{name} is {value}, it must be finite and > 0.", mend=f"{flag_of(name)} 30"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A value that the core or a backend had to set otherwise than configured; printed once at
    start.
    """

    field: str
    value: Any
    why: str


_CONFIGS = (EngineConfig, ServerConfig)


def apply_changes(config: EngineConfig, changes: Sequence[Change]) -> EngineConfig:
    """The config with the changes in it."""
    return dataclasses.replace(config, **{c.field: c.value for c in changes})


def flag_of(name: str) -> str:
    """`max_model_len` -> `--max-model-len`."""
    return "--" + name.replace("_", "-")


def add_arguments(
    parser: argparse.ArgumentParser, cls: type[C], *, skip: Sequence[str] = ()
) -> None:
    """One flag per field of `cls`, none with a default: absent flags leave room for file and
    environment.
    """
    group = parser.add_argument_group(f"{cls.__name__.removesuffix('Config').lower()} options")
    for f in dataclasses.fields(cls):
        if f.name in skip:
            continue
        kind = _kind(cls, f.name)
        default = None if f.default is dataclasses.MISSING else f.default
        text = f.metadata["help"] + ("" if default in (None, (), "") else f" (default: {default})")
        text = text.replace("%", "%%")
        dest = {"dest": f.name, "default": argparse.SUPPRESS, "help": text}
        if kind.type is bool:
            group.add_argument(flag_of(f.name), action=argparse.BooleanOptionalAction, **dest)
        elif f.name == "served_model_name":  # several at once, as in vLLM
            group.add_argument(flag_of(f.name), action="extend", nargs="+", metavar="NAME", **dest)
        elif kind.many:
            group.add_argument(flag_of(f.name), action="append", metavar="VALUE", **dest)
        else:
            group.add_argument(flag_of(f.name), metavar=_metavar(kind), **dest)


def load(
    cls: type[C],
    given: Mapping[str, Any],
    *,
    file: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> C:
    """Config from what was given (flags, keywords), then the YAML file, then TOKENRY_* variables,
    then defaults.

    Raises ConfigError that names the flag, the file's key or the variable.
    """
    names = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    environ = os.environ if environ is None else environ
    _check_variables(environ)
    for name in sorted(names):
        variable = ENV_PREFIX + name.upper()
        if environ.get(variable):
            raw: Any = environ[variable]
            if _kind(cls, name).many:
                raw = [part for part in raw.split(",") if part]
            values[name] = _convert(cls, name, raw, where=variable)
    for key, value in _read_file(file).items() if file else ():
        name = key.replace("-", "_")
        if name in names:
            values[name] = _convert(cls, name, value, where=f"{file}: {key}")
    for name, value in given.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"There is no option {name!r}.", mend=f"did you mean {near[0]!r}?" if near else None
            )
        values[name] = _convert(cls, name, value, where=flag_of(name))
    if "model" in names and "model" not in values:
        raise ConfigError("No model is named.", mend="MODEL, TOKENRY_MODEL or `model` in the file")
    return cls(**values)


def _check_variables(environ: Mapping[str, str]) -> None:
    """Every TOKENRY_* variable belongs to some config; a mistyped one would mean nothing, in
    silence.
    """
    known = {ENV_PREFIX + f.name.upper() for c in _CONFIGS for f in dataclasses.fields(c)}
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX) and variable not in known:
            near = difflib.get_close_matches(variable, known, n=1)
            raise ConfigError(
                f"The environment has {variable}, and there is no such option.",
                mend=f"did you mean {near[0]}?" if near else f"unset {variable}",
            )


def check_file_keys(file: str) -> None:
    """Every key of the YAML file belongs to some config; raises ConfigError with the nearest name
    otherwise.
    """
    known = {f.name for c in _CONFIGS for f in dataclasses.fields(c)}
    for key in _read_file(file):
        if key.replace("-", "_") not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            raise ConfigError(
                f"{file}: unknown key {key!r}.", mend=f"did you mean {near[0]!r}?" if near else None
            )


def environment(name: str, default: str = "") -> str:
    """One variable of the environment, for the few facts that are not options (colours, debug
    switches).
    """
    return os.environ.get(name, default)


@dataclass(frozen=True, slots=True)
class _Kind:
    type: type
    many: bool
    optional: bool
    choices: tuple[str, ...]


def _kind(cls: type, name: str) -> _Kind:
    hint = typing.get_type_hints(cls)[name]
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        optional = True
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple:
        return _Kind(typing.get_args(hint)[0], True, optional, ())
    if typing.get_origin(hint) is Literal:
        return _Kind(str, False, optional, typing.get_args(hint))
    return _Kind(hint, False, optional, ())


def _metavar(kind: _Kind) -> str:
    return "{" + ",".join(kind.choices) + "}" if kind.choices else kind.type.__name__.upper()


def _convert(cls: type, name: str, value: Any, *, where: str) -> Any:
    kind = _kind(cls, name)
    if value is None and kind.optional:
        return None
    if kind.many:
        items = [value] if isinstance(value, (str, int, float)) else list(value)
        return tuple(kind.type(item) for item in items)
    try:
        if kind.type is bool:
            return _to_bool(value)
        if kind.type is int:
            return _to_int(value)
        if kind.type is float:
            return float(value)
    except (TypeError, ValueError, OverflowError):  # int(inf) overflows
        what = {bool: "true or false", int: "a whole number", float: "a number"}[kind.type]
        raise ConfigError(f"{where}: {value!r} is not {what}.") from None
    text = str(value)
    if kind.choices and text not in kind.choices:
        raise ConfigError(f"{where}: {text!r} is not one of {', '.join(kind.choices)}.")
    return text


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError(value)


def _to_int(value: Any) -> int:
    """An int; also "128k" and "4GiB" (k, m, g: powers of 1,000; ki, mi, gi: powers of 1,024; a
    final b is ignored).
    """
    if isinstance(value, bool):
        raise ValueError(value)
    if isinstance(value, int):
        return value
    text = str(value).strip().lower().replace("_", "").removesuffix("b")
    for suffix, power in (
        ("ki", 2**10),
        ("mi", 2**20),
        ("gi", 2**30),
        ("k", 10**3),
        ("m", 10**6),
        ("g", 10**9),
    ):
        if text.endswith(suffix):
            return int(float(text.removesuffix(suffix)) * power)
    return int(text)


def _read_file(file: str) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no config file {file}.", mend="--config FILE") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error}.") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{file} holds a {type(data).__name__}, not a mapping of option names to values."
        )
    return data


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(
                f"{name} is {value}, it must be at least {least}.", mend=f"{flag_of(name)} N"
            )
