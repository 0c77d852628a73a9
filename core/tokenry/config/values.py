"""What an option is: its field, its kind, and a text or a YAML value made into that kind.

In: raw values with the name of where they stood. Out: values of the field's type, or a ConfigError
that names the place. Knows no option by name.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenry.errors import ConfigError


def option(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a config; its help text is what every reference shows."""
    return field(default=default, metadata={"help": help})


def flag_of(name: str) -> str:
    """`max_model_len` -> `--max-model-len`."""
    return "--" + name.replace("_", "-")


def at_least(config: Any, least: int, *names: str) -> None:
    """Raises ConfigError for a field below `least` or infinite; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(
                f"{name} is {value}, it must be at least {least}.", mend=f"{flag_of(name)} N"
            )


@dataclass(frozen=True, slots=True)
class Kind:
    """The type of a field's values, whether it takes several, may be None, and which texts."""

    type: type
    many: bool
    optional: bool
    choices: tuple[str, ...]


def kind_of(cls: type, name: str) -> Kind:
    """The kind of one field of a config."""
    hint = typing.get_type_hints(cls)[name]
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        optional = True
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is tuple:
        return Kind(typing.get_args(hint)[0], True, optional, ())
    if typing.get_origin(hint) is Literal:
        return Kind(str, False, optional, typing.get_args(hint))
    return Kind(hint, False, optional, ())


def metavar(kind: Kind) -> str:
    """What `--help` shows for the value."""
    return "{" + ",".join(kind.choices) + "}" if kind.choices else kind.type.__name__.upper()


def convert(cls: type, name: str, value: Any, *, where: str) -> Any:
    """`value` as the field's type; ConfigErrors begin with `where` it stood."""
    kind = kind_of(cls, name)
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
