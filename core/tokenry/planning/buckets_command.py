"""`tokenry buckets`: which programs a device would get, what of a load would be padding, and a
tuner that picks better ones.

In: a model (for its length and KV), a backend, the engine's flags, a recorded load or none. Out: a
table; with --tune a bucket file for `serve --bucket-file`. The model's weights are not loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenry.backend.contract import Bucket, Caps, KVSpec
from tokenry.config import EngineConfig, check_file_keys
from tokenry.config import add_arguments as add_config
from tokenry.config import load as load_config
from tokenry.engine.limits import EngineLimits
from tokenry.errors import ConfigError
from tokenry.models.config import ModelConfig
from tokenry.planning.devices import find_device
from tokenry.planning.ledger import ITEM_BYTES, Limits, make_plan
from tokenry.planning.load import mixed_load, needs_of
from tokenry.planning.parameters import parts_of
from tokenry.planning.tuner import tune
from tokenry.planning.waste import Waste, total, waste_of, waste_per_bucket
from tokenry.runner.bucket_file import bucket_file_text, bucket_settings
from tokenry.runner.bucket_grid import deviations, make_buckets
from tokenry.runner.buckets import BucketSettings, BucketTable, Need
from tokenry.runner.shapes import Extent
from tokenry.runner.step_log import Step, read_steps

HELD_OUT = 5
"""With --tune, of the load every fifth stretch of steps judges, the others tune."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the buckets of one engine on one device follow from."""

    name: str
    caps: Caps
    extent: Extent
    limits: EngineLimits
    settings: BucketSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command, and those of the engine that buckets depend on."""
    parser.add_argument("model", help="directory, hub id or installed model ('demo')")
    parser.add_argument(
        "--explain", action="store_true", help="one line per program (otherwise a summary)"
    )
    parser.add_argument(
        "--load",
        metavar="FILE",
        help="recorded with `serve --record-steps FILE`; without it a mixed load is made up",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="a device that is not here, as in `tokenry plan`, instead of --backend",
    )
    parser.add_argument("--tune", action="store_true", help="pick buckets for the load")
    parser.add_argument("--output", metavar="FILE", help="where --tune writes the bucket file")
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    add_config(parser, EngineConfig, skip=("model",))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; with --tune also write the file."""
    if args.output and not args.tune:
        raise ConfigError("--output is where --tune writes.", mend="--tune --output FILE")
    if args.config:
        check_file_keys(args.config)
    names = {f.name for f in dataclasses.fields(EngineConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    device = find_device_of(load_config(EngineConfig, given, file=args.config), args.device)
    steps = read_steps(args.load) if args.load else mixed_load(device.limits)
    where = args.load or "a generated mixed load"
    if args.tune:
        print(tuned(device, steps, where, args.output))
        return 0
    needs = needs_of(steps, device.caps, device.extent)
    print(explained(device, needs, where, all_programs=args.explain))
    return 0


def find_device_of(config: EngineConfig, figures: str | None) -> Device:
    """Caps and room of a device that is open, or of one that is known by its figures; and the
    largest step that the engine can ask of it.
    """
    from tokenry.hub import find_model
    from tokenry.planning.parameters import decoder_config

    model = decoder_config(find_model(config.model, config.revision))
    name, caps, room = _opened(config) if figures is None else _planned(config, model, figures)
    block_size = config.block_size or caps.block_sizes[0]
    if block_size not in caps.block_sizes:
        raise ConfigError(
            f"--block-size {block_size}: this backend has {', '.join(map(str, caps.block_sizes))}.",
            mend=f"--block-size {caps.block_sizes[0]}",
        )
    blocks = _num_blocks(config, model, block_size, room)
    length = min(config.max_model_len or model.max_len, max(1, blocks - 1) * block_size)
    return Device(
        name=name,
        caps=caps,
        extent=Extent(
            max_seqs=config.max_num_seqs,
            max_tokens=config.max_num_batched_tokens,
            max_blocks=-(-length // block_size),
            block_size=block_size,
            total_blocks=blocks,
        ),
        limits=EngineLimits(
            num_blocks=blocks,
            block_size=block_size,
            max_model_len=length,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefix_caching=config.enable_prefix_caching and caps.phases.chunked,
            chunked_prefill=config.enable_chunked_prefill and caps.phases.chunked,
            overlap=False,
        ),
        settings=bucket_settings(
            strategy=config.bucket_strategy,
            axes=config.bucket_axis,
            file=config.bucket_file,
            max_programs=config.max_programs,
        ),
    )


Room = Callable[[KVSpec, int], int]
"""(KV of the model, bytes of its weights) -> KV blocks that fit beside them."""


def _opened(config: EngineConfig) -> tuple[str, Caps, Room]:
    """A backend's own Caps; the device may be absent if the backend can do without."""
    from tokenry.backend.discovery import choose, discover, open_backend

    ref = choose(
        discover(config.backend), config.backend, index=config.device_index, compile_only=True
    )
    backend = open_backend(ref, config.backend_options)
    memory = backend.memory()
    budget = min(int(memory.total * config.memory_fraction), memory.free)

    def room(spec: KVSpec, weights: int) -> int:
        return (budget - weights) * 9 // 10 // spec.block_bytes

    return f"{ref.backend}: {ref.name}", backend.caps, room


def _planned(config: EngineConfig, model: ModelConfig, figures: str) -> tuple[str, Caps, Room]:
    """As `tokenry plan` has it."""
    device, devices = find_device(figures)
    plan = make_plan(
        model,
        device,
        devices,
        Limits(
            dtype=_dtype(config, model),
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            memory_fraction=config.memory_fraction,
            block_size=config.block_size,
        ),
    )
    return f"{devices} x {device.name}", device.caps, lambda spec, weights: plan.num_blocks


def _dtype(config: EngineConfig, model: ModelConfig) -> str:
    return model.dtype if config.dtype == "auto" else config.dtype


def _num_blocks(config: EngineConfig, model: ModelConfig, block_size: int, room: Room) -> int:
    """KV blocks that the device has room for beside the weights: about what `serve` will find."""
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    spec = KVSpec(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=block_size,
        dtype=_dtype(config, model),
    )
    if config.kv_cache_bytes is not None:
        return max(2, config.kv_cache_bytes // spec.block_bytes)
    weights = sum(part.count for part in parts_of(model)) * ITEM_BYTES[spec.dtype]
    length = config.max_model_len or model.max_len
    useful = 2 * config.max_num_seqs * -(-length // block_size) + 1
    found = min(useful, room(spec, weights))
    if found < 2:
        raise ConfigError(
            f"The weights ({weights / 2**30:.2f} GiB) leave no room for KV blocks of "
            f"{block_size} tokens.",
            mend="--num-kv-blocks N to go on nevertheless, and see `tokenry plan`",
        )
    return found


# ---- what is printed -------------------------------------------------------------------------


def explained(device: Device, needs: Counter[Need], where: str, *, all_programs: bool) -> str:
    """The programs and their padding on the load."""
    price = device.settings.block_price
    buckets = make_buckets(device.caps, device.extent, device.settings)
    parts = waste_per_bucket(needs, BucketTable(buckets, device.caps, price), device.caps, price)
    source = "from a file" if device.settings.buckets else device.settings.strategy
    notes = deviations(device.caps, device.settings, buckets)
    lines = [*_head(device, buckets, source), *notes, ""]
    if not buckets:
        return "\n".join([*lines, "Every step runs in its own shape: there is nothing to pad."])
    if all_programs:
        lines += ["   phase    rows  tokens  kv blocks  logits  launches  padding: tokens  blocks"]
        lines += [_line(i + 1, bucket, parts[bucket]) for i, bucket in enumerate(buckets)]
        lines += [""]
    unused = sum(part.launches == 0 for part in parts.values())
    lines += [
        *_summary(where, total(parts, price)),
        f"{unused} programs are not used by this load.",
    ]
    if device.caps.shapes.static:
        lines += _others(device, needs)
    return "\n".join(lines)


def tuned(device: Device, steps: list[Step], where: str, output: str | None) -> str:
    """Tune on four fifths of the load, judge on the rest, write the file."""
    price = device.settings.block_price
    learn, judge = _parted(steps)
    seen, fresh = (needs_of(part, device.caps, device.extent) for part in (learn, judge))
    default = BucketSettings(max_programs=device.settings.max_programs, block_price=price)
    before = make_buckets(device.caps, device.extent, default)
    after = tune(seen, device.caps, device.extent, device.settings)
    lines = [
        *_head(device, after, "tuned"),
        "",
        f"Load: {where}; every fifth stretch of steps judges.",
    ]
    cut = 0.0
    for name, needs in (("steps tuned on", seen), ("steps that judge", fresh)):
        old, new = (waste_of(needs, b, device.caps, price) for b in (before, after))
        padding = old.work_run - old.work
        cut = 1 - (new.work_run - new.work) / padding if padding else 0.0
        lines.append(
            f"  {name:<17} padding {old.share:.1%} of the work with the default's {len(before)} "
            f"programs, {new.share:.1%} with {len(after)}: {cut:.0%} less"
        )
    if output is not None:
        text = bucket_file_text(
            after,
            max_programs=len(after),
            block_price=price,
            comments=[
                f"Tuned for {device.name}, on {where} ({len(steps)} steps).",
                f"Padding on steps it was not tuned on: {cut:.0%} less than the default's.",
                _limits_line(device),
            ],
        )
        _write(output, text)
        lines.append(f"Written to {output}: tokenry serve --bucket-file {output}")
    return "\n".join(lines)


def _parted(steps: list[Step]) -> tuple[list[Step], list[Step]]:
    """Stretches of 50 steps: neighbours are alike, so single steps would not judge honestly."""
    size = max(1, min(50, len(steps) // 10))
    learn: list[Step] = []
    judge: list[Step] = []
    for i, step in enumerate(steps):
        (judge if i // size % HELD_OUT == HELD_OUT - 1 else learn).append(step)
    return learn, judge


def _head(device: Device, buckets: list[Bucket], source: str) -> list[str]:
    rules = device.caps.shapes
    most = f", of {rules.max_programs} that it holds" if rules.static else ""
    return [
        f"{device.name}: {len(buckets)} programs ({source}){most}",
        _limits_line(device),
    ]


def _limits_line(device: Device) -> str:
    limits = device.limits
    return (
        f"max_model_len {limits.max_model_len}, max_num_seqs {limits.max_num_seqs}, "
        f"max_num_batched_tokens {limits.max_num_batched_tokens}, "
        f"{limits.num_blocks} KV blocks of {limits.block_size} tokens"
    )


def _line(number: int, b: Bucket, part: Waste) -> str:
    used = f"{part.token_share:>15.0%} {part.block_share:>7.0%}" if part.launches else ""
    return (
        f"{number:>3} {b.phase:<8} {b.seqs:>4} {b.tokens:>7} {b.kv_blocks:>10}  {b.logits:<6} "
        f"{part.launches:>9}  {used}".rstrip()
    )


def _summary(where: str, whole: Waste) -> list[str]:
    return [
        f"Padding on {where} ({whole.launches} launches): {whole.share:.1%} of the work "
        f"({whole.token_share:.1%} of the tokens, {whole.block_share:.1%} of the KV blocks; "
        f"a block counts as {whole.block_price:g} tokens)."
    ]


def _others(device: Device, needs: Counter[Need]) -> list[str]:
    """What the other strategies would waste with as many programs."""
    price, found = device.settings.block_price, []
    for strategy in ("exponential", "linear", "padding-aware"):
        settings = bucket_settings(strategy=strategy, max_programs=device.settings.max_programs)
        settings = dataclasses.replace(settings, block_price=price)
        buckets = make_buckets(device.caps, device.extent, settings)
        share = waste_of(needs, buckets, device.caps, price).share
        found.append(f"{strategy} {share:.1%} ({len(buckets)} programs)")
    return ["For comparison: " + ", ".join(found) + "; --tune picks from a load."]


def _write(file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written: {error.strerror}.", mend="--output"
        ) from error
