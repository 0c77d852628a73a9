"""`tokenry keys add|list|remove`: the file that --api-keys-file names.

In: argv. Out: a changed file, and on stdout the new key: it is shown once and stored nowhere, the
file has its hash. A running server sees the change within a second.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from tokenry.api.keys import Key, KeyFile, digest, new_text, read_keys, write_keys
from tokenry.config import environment
from tokenry.errors import ConfigError

_VARIABLE = "TOKENRY_API_KEYS_FILE"
_LIMITS = {
    "requests_per_minute": (int, "requests per minute"),
    "tokens_per_minute": (int, "prompt and answer tokens per minute"),
    "max_concurrent": (int, "requests under way at once"),
    "ttft_ms": (float, "target: milliseconds to the first token"),
    "tpot_ms": (float, "target: milliseconds per token after it"),
    "deadline_ms": (float, "target: milliseconds to the end"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three commands and their options."""
    commands = parser.add_subparsers(metavar="add|list|remove", required=True)
    add = commands.add_parser("add", help="make a key and print it, once")
    add.add_argument("name", help="what the log and the metrics call it")
    add.add_argument("--admin", action="store_true", help="may load and unload models")
    text = "added to its requests' priorities (lower runs first), which may then only be >= 0"
    add.add_argument("--priority", type=int, help=text)
    for name, (kind, text) in _LIMITS.items():
        add.add_argument("--" + name.replace("_", "-"), type=kind, help=text)
    add.set_defaults(run=_add)
    show = commands.add_parser("list", help="names and limits")
    show.set_defaults(run=_list)
    remove = commands.add_parser("remove", help="forget a key")
    remove.add_argument("name")
    remove.set_defaults(run=_remove)
    for command in (add, show, remove):
        command.add_argument("--file", help=f"the file of keys (default: {_VARIABLE})")
        command.set_defaults(parser=command)


def _path(args: argparse.Namespace) -> Path:
    name = args.file or environment(_VARIABLE)
    if not name:
        raise ConfigError("No key file is named.", mend=f"--file FILE, or {_VARIABLE}")
    return Path(name)


def _add(args: argparse.Namespace) -> int:
    path = _path(args)
    keys = read_keys(path).keys if path.exists() else ()
    if any(key.name == args.name for key in keys):
        raise ConfigError(
            f"{path} has a key {args.name!r} already.", mend=f"tokenry keys remove {args.name}"
        )
    text = new_text()
    limits = {name: getattr(args, name) for name in _LIMITS}
    try:
        key = Key(
            name=args.name,
            sha256=digest(text),
            admin=args.admin,
            priority=args.priority,
            **limits,
        )
    except ValueError as error:
        raise ConfigError(f"{error}.") from error
    _write(path, KeyFile(keys=(*keys, key)))
    print(f"{path}: {args.name} was added; its key is shown once:", file=sys.stderr)
    print(text)
    return 0


def _list(args: argparse.Namespace) -> int:
    for key in read_keys(_path(args)).keys:
        told = {k: v for k, v in msgspec.structs.asdict(key).items() if v not in (None, False)}
        name, fingerprint = told.pop("name"), told.pop("sha256")[:8]
        limits = " ".join(k if v is True else f"{k}={v}" for k, v in told.items())
        print(f"{name:20} sha256:{fingerprint}…  {limits or 'no limits'}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    path = _path(args)
    keys = read_keys(path).keys
    left = tuple(key for key in keys if key.name != args.name)
    if len(left) == len(keys):
        names = ", ".join(key.name for key in keys) or "none"
        raise ConfigError(f"{path} has no key {args.name!r}; it has: {names}.")
    _write(path, KeyFile(keys=left))
    print(f"{path}: {args.name} was removed.", file=sys.stderr)
    return 0


def _write(path: Path, keys: KeyFile) -> None:
    try:
        write_keys(path, keys)
    except OSError as error:
        raise ConfigError(f"The key file {path} cannot be written: {error.strerror}.") from error
