"""Bucket settings from flags and a YAML file, and the file that the tuner writes.

In: values of the flags, the file's text. Out: `BucketSettings`, or a ConfigError that names the
key. Flags outrank the file.

    strategy: padding-aware
    max_programs: 48
    block_price: 0.2
    axes:
      prefill.tokens: {min: 128, step: 128, max: 4096, pad_percent: 20}
      decode.seqs: {values: [1, 2, 4, 8, 12, 16]}
    buckets:                                   # from `tokenry buckets --tune`; instead of axes
      - {phase: decode, seqs: 4, tokens: 4, kv_blocks: 24}
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenry.backend.contract import Bucket
from tokenry.errors import ConfigError
from tokenry.runner.axes import STRATEGIES, AxisRule, Strategy
from tokenry.runner.bucket_grid import AXES
from tokenry.runner.buckets import BLOCK_PRICE, BucketSettings

_KEYS = ("strategy", "max_programs", "block_price", "axes", "buckets")
_BUCKET_KEYS = ("phase", "seqs", "tokens", "kv_blocks", "logits")


def bucket_settings(
    *,
    strategy: str = "auto",
    axes: Sequence[str] = (),
    file: str | None = None,
    max_programs: int | None = None,
) -> BucketSettings:
    """The settings. strategy "auto": the file's, else exponential; axes: `NAME=MIN:STEP:MAX` (a
    part may be empty) or `NAME=VALUE,VALUE,...`.
    """
    settings = read_bucket_file(file) if file is not None else BucketSettings()
    changed: dict[str, Any] = {}
    if strategy != "auto":
        changed["strategy"] = _strategy(strategy, "--bucket-strategy")
    if axes:
        changed["axes"] = {**settings.axes, **dict(_axis_flag(text) for text in axes)}
    if strategy != "auto" or axes:
        changed["buckets"] = ()  # a grid was asked for
    if max_programs is not None:
        changed["max_programs"] = max_programs
    return dataclasses.replace(settings, **changed)


def read_bucket_file(file: str) -> BucketSettings:
    """The settings in a YAML file."""
    import yaml

    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"There is no bucket file {file}.", mend="tokenry buckets MODEL --tune --output FILE"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error}.") from error
    data = _mapping({} if data is None else data, file, _KEYS)
    most = data.get("max_programs")
    price = data.get("block_price", BLOCK_PRICE)
    if not isinstance(price, int | float) or isinstance(price, bool) or price < 0:
        raise ConfigError(f"{file}: block_price is {price!r}, it must be a number of at least 0.")
    buckets = data.get("buckets") or []
    if not isinstance(buckets, list):
        raise ConfigError(f"{file}: buckets is a {type(buckets).__name__}, not a list.")
    axes = _mapping(data.get("axes") or {}, f"{file}: axes", tuple(AXES))
    return BucketSettings(
        strategy=_strategy(data.get("strategy", "exponential"), f"{file}: strategy"),
        axes={name: _rule(rule, f"{file}: {name}") for name, rule in axes.items()},
        buckets=tuple(_bucket(b, f"{file}: bucket {i + 1}") for i, b in enumerate(buckets)),
        max_programs=None if most is None else _size(most, f"{file}: max_programs"),
        block_price=float(price),
    )


def bucket_file_text(
    buckets: Iterable[Bucket], *, max_programs: int, block_price: float, comments: Sequence[str]
) -> str:
    """YAML that `read_bucket_file` understands, with lines of comment before it."""
    lines = [f"# {line}".rstrip() for line in comments]
    lines += [f"max_programs: {max_programs}", f"block_price: {block_price:g}", "buckets:"]
    for b in buckets:
        scored = ", logits: all" if b.logits == "all" else ""
        lines.append(
            f"  - {{phase: {b.phase}, seqs: {b.seqs}, tokens: {b.tokens}, "
            f"kv_blocks: {b.kv_blocks}{scored}}}"
        )
    return "\n".join(lines) + "\n"


def _axis_flag(text: str) -> tuple[str, AxisRule]:
    name, _, value = text.partition("=")
    _mapping({name: value}, "--bucket-axis", tuple(AXES))
    where = f"--bucket-axis {text}"
    if "," in value:
        return name, AxisRule(values=tuple(_size(part, where) for part in value.split(",")))
    parts = value.split(":")
    if len(parts) != 3:
        raise ConfigError(
            f"{where}: {value!r} is neither MIN:STEP:MAX nor VALUE,VALUE,...",
            mend=f"--bucket-axis {name}=1:2:64",
        )
    low, step, high = (_size(part, where) if part else None for part in parts)
    return name, AxisRule(min=1 if low is None else low, step=step, max=high)


def _rule(data: Any, where: str) -> AxisRule:
    names = tuple(f.name for f in dataclasses.fields(AxisRule))
    found = dict(_mapping(data, where, names))
    values = found.pop("values", [])
    if not isinstance(values, list):
        raise ConfigError(f"{where}: values is a {type(values).__name__}, not a list.")
    sizes = {key: _size(value, f"{where}: {key}", low=0) for key, value in found.items()}
    return AxisRule(**sizes, values=tuple(_size(v, f"{where}: values") for v in values))


def _bucket(data: Any, where: str) -> Bucket:
    found = _mapping(data, where, _BUCKET_KEYS)
    phase, logits = found.get("phase"), found.get("logits", "last")
    if phase not in ("prefill", "decode", "mixed") or logits not in ("last", "all"):
        raise ConfigError(
            f"{where}: phase {phase!r}, logits {logits!r}.",
            mend="phase: prefill, decode or mixed; logits: last or all",
        )
    seqs, tokens = (_size(found.get(key), f"{where}: {key}") for key in ("seqs", "tokens"))
    if tokens < seqs:
        raise ConfigError(f"{where}: {tokens} tokens are less than one for each of {seqs} rows.")
    kv_blocks = _size(found.get("kv_blocks", 0), f"{where}: kv_blocks", low=0)
    return Bucket(phase, seqs, tokens, kv_blocks, logits)


def _strategy(name: Any, where: str) -> Strategy:
    for strategy in STRATEGIES:
        if name == strategy:
            return strategy
    raise ConfigError(f"{where}: {name!r} is not one of {', '.join(STRATEGIES)}.")


def _mapping(data: Any, where: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ConfigError(f"{where} holds a {type(data).__name__}, not a mapping.")
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1) or list(known)
            raise ConfigError(f"{where}: unknown name {key!r}.", mend=f"{' or '.join(near)}")
    return data


def _size(value: Any, where: str, *, low: int = 1) -> int:
    try:
        size = int(value) if isinstance(value, str) else value
    except ValueError:
        size = None
    if not isinstance(size, int) or isinstance(size, bool) or size < low:
        raise ConfigError(f"{where}: {value!r} is not a whole number of at least {low}.")
    return size
