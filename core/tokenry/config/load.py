"""A config from flags, a YAML file and the environment: the only reader of the environment.

In: flags, a file's keys, TOKENRY_* variables (in this order of precedence), or keyword arguments.
Out: a config, whole at birth; a wrong name or value is a ConfigError that names it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tokenry.config.engine import EngineConfig
from tokenry.config.server import ServerConfig
from tokenry.config.values import convert, flag_of, kind_of, metavar
from tokenry.errors import ConfigError

ENV_PREFIX = "TOKENRY_"
C = TypeVar("C", EngineConfig, ServerConfig)
_CONFIGS = (EngineConfig, ServerConfig)


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
        kind = kind_of(cls, f.name)
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
            group.add_argument(flag_of(f.name), metavar=metavar(kind), **dest)


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
            if kind_of(cls, name).many:
                raw = [part for part in raw.split(",") if part]
            values[name] = convert(cls, name, raw, where=variable)
    for key, value in read_file(file).items() if file else ():
        name = key.replace("-", "_")
        if name in names:
            values[name] = convert(cls, name, value, where=f"{file}: {key}")
    for name, value in given.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise ConfigError(
                f"There is no option {name!r}.", mend=f"did you mean {near[0]!r}?" if near else None
            )
        values[name] = convert(cls, name, value, where=flag_of(name))
    if "model" in names and "model" not in values:
        raise ConfigError("No model is named.", mend="MODEL, TOKENRY_MODEL or `model` in the file")
    return cls(**values)


def _check_variables(environ: Mapping[str, str]) -> None:
    """Every TOKENRY_* variable belongs to some config; a mistyped one would mean nothing, in
    silence.
    """
    known = {ENV_PREFIX + f.name.upper() for c in _CONFIGS for f in dataclasses.fields(c)}
    for variable in sorted(environ):
        if variable.startswith(ENV_PREFIX) and variable not in known and not _of_plugin(variable):
            near = difflib.get_close_matches(variable, known, n=1)
            raise ConfigError(
                f"The environment has {variable}, and there is no such option.",
                mend=f"did you mean {near[0]}?" if near else f"unset {variable}",
            )


def _of_plugin(variable: str) -> bool:
    """Whether an installed backend's name follows the prefix (TOKENRY_NAME_...): then it is the
    plugin's to read and to check.
    """
    installed = importlib.metadata.entry_points(group="tokenry.backends").names
    return any(variable.startswith(f"{ENV_PREFIX}{name.upper()}_") for name in installed)


def our_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Names of the TOKENRY_* variables that are set; raises ConfigError for one that is none."""
    environ = os.environ if environ is None else environ
    _check_variables(environ)
    return sorted(name for name in environ if name.startswith(ENV_PREFIX))


def check_file_keys(file: str) -> None:
    """Every key of the YAML file belongs to some config; raises ConfigError with the nearest name
    otherwise.
    """
    known = {f.name for c in _CONFIGS for f in dataclasses.fields(c)}
    for key in read_file(file):
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


def read_file(file: str) -> dict[str, Any]:
    """A YAML file's options; raises ConfigError."""
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
