"""Frozen configuration, and the only reader of the environment.

In: flags, a YAML file, TOKENRY_* variables (in this order of precedence), or keyword arguments.
Out: `EngineConfig` and `ServerConfig`, whole at birth; a wrong name or value is a `ConfigError`
that names it. Each field's help text is its metadata, so the command line, the file, the
environment and the reference page are one list. Nobody changes a config after `assemble`: what a
device needs otherwise is a `Change`, applied once and printed.

A new option is one field in engine.py or server.py; load.py and values.py know none by name.
"""

from tokenry.config.engine import Change, EngineConfig, apply_changes
from tokenry.config.load import (
    ENV_PREFIX,
    add_arguments,
    check_file_keys,
    environment,
    load,
    our_variables,
)
from tokenry.config.server import ServerConfig
from tokenry.config.values import flag_of

__all__ = [
    "ENV_PREFIX",
    "Change",
    "EngineConfig",
    "ServerConfig",
    "add_arguments",
    "apply_changes",
    "check_file_keys",
    "environment",
    "flag_of",
    "load",
    "our_variables",
]
