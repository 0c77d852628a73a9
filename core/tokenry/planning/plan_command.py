"""`tokenry plan`: does the model fit, with how much context, for how many at once.

In: a config.json (or its directory) and a device's name. Out: the ledger of one device as a table
or JSON; exit code 0 if it fits, 1 if not. Reads no weights, loads no torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path

from tokenry.errors import ConfigError, ModelLoadError, TokenryError
from tokenry.models.config import ModelConfig
from tokenry.planning.devices import find_device
from tokenry.planning.ledger import ITEM_BYTES, Limits, Plan, make_plan
from tokenry.planning.parameters import decoder_config

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command; those that `serve` has mean the same."""
    parser.add_argument("model", help="config.json, or a directory or installed model that has one")
    parser.add_argument("--device", required=True, help="NAME or NAMExCOUNT")
    parser.add_argument(
        "--dtype", choices=["auto", *ITEM_BYTES], default="auto", help="auto: the checkpoint's"
    )
    parser.add_argument("--max-model-len", type=int, metavar="INT", help="default: the model's own")
    parser.add_argument("--max-num-seqs", type=int, default=128, metavar="INT")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, metavar="INT")
    parser.add_argument("--memory-fraction", type=float, default=0.9, metavar="FLOAT")
    parser.add_argument(
        "--graph-memory-fraction",
        type=float,
        metavar="FLOAT",
        help="share of what weights, activations and margin leave that captured or compiled "
        "programs get (default: the device's)",
    )
    parser.add_argument("--block-size", type=int, metavar="INT", help="tokens of a KV block")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0 if it fits."""
    model = _read_model(args.model)
    device, devices = find_device(args.device)
    limits = _limits(args, model)
    plan = make_plan(model, device, devices, limits)
    mends = [] if plan.fits else _mends(model, plan)
    print(as_json(plan, mends) if args.json else table(model, plan, mends))
    return 0 if plan.fits else 1


def _read_model(name: str) -> ModelConfig:
    """The config of a file, a directory, or a model by name."""
    path = Path(name)
    if path.is_file():
        if path.name != "config.json":
            raise ModelLoadError(f"{name} is not a config.json.", mend="tokenry plan DIR")
        return decoder_config(path.parent)
    from tokenry.hub import find_model

    return decoder_config(find_model(name))


def _limits(args: argparse.Namespace, model: ModelConfig) -> Limits:
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size")
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, it must be at least 1.")
    for name, top in (("memory_fraction", 1.0), ("graph_memory_fraction", 0.99)):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= top:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} is {value}, it must lie in [0, {top}].", mend=f"{flag} 0.5")
    return Limits(
        dtype=model.dtype if args.dtype == "auto" else args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        memory_fraction=args.memory_fraction,
        graph_memory_fraction=args.graph_memory_fraction,
        block_size=args.block_size,
    )


def table(model: ModelConfig, plan: Plan, mends: list[str]) -> str:
    """The plan for a reader."""
    device, limits = plan.device, plan.limits
    fraction = limits.graph_memory_fraction
    kept = device.graph_memory_fraction if fraction is None else fraction
    phases = Counter(bucket.phase for bucket in plan.buckets)
    programs = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items()))
    share = f"{kept:.0%} of what is left"
    why = {
        "runtime": "driver, runtime, collectives (estimate)",
        "weights": f"{plan.model_weights / 1e9:.2f} G parameters, {limits.dtype}, "
        f"over {plan.devices}",
        "activations": f"{limits.max_num_batched_tokens} tokens, {limits.max_num_seqs} rows of "
        f"{model.vocab_size} logits (formula)",
        "programs": f"{share}" + (f": {len(plan.buckets)} ({programs})" if programs else ""),
        "margin": "2% of what may be used",
        "kv": f"{plan.num_blocks} blocks of {plan.block_size} tokens, "
        f"{plan.block_bytes / 2**20:.2f} MiB each",
        "left free": f"not used: --memory-fraction {limits.memory_fraction}",
    }
    lines = [
        f"{model.architecture}, {model.num_layers} layers, on {plan.devices} x {device.name} "
        f"({device.memory_bytes / GIB:.1f} GiB each)",
        "",
        "one device           GiB",
        *(f"  {name:<12} {size / GIB:>9.2f}   {why[name]}" for name, size in plan.ledger.items()),
        f"  {'total':<12} {device.memory_bytes / GIB:>9.2f}",
        "",
    ]
    floor = (
        f"A decode step of one request reads {plan.read_bytes / GIB:.2f} GiB of weights on each "
        f"device: {plan.decode_floor_s * 1e3:.2f} ms at least, "
        f"{1 / plan.decode_floor_s:.0f} tokens per second at most."
    )
    return "\n".join([*lines, _verdict(model, plan), *(f"  mend: {m}" for m in mends), floor])


def _verdict(model: ModelConfig, plan: Plan) -> str:
    if plan.fits:
        return (
            f"It fits: {plan.concurrency:.1f} requests of {plan.max_model_len} tokens at once "
            f"({plan.kv_tokens} tokens of KV cache); one request could have "
            f"{min(plan.max_fitting, model.max_len)} tokens."
        )
    if not plan.weights_fit:
        return (
            f"It does not fit: of {plan.budget / GIB:.2f} GiB that may be used on each device, the "
            f"weights take {plan.ledger['weights'] / GIB:.2f} GiB."
        )
    return (
        f"It does not fit: one request of {plan.max_model_len} tokens needs "
        f"{_request_bytes(plan) / GIB:.2f} GiB of KV cache on each device, "
        f"{max(0, plan.num_blocks - 1) * plan.block_bytes / GIB:.2f} GiB is left."
    )


def as_json(plan: Plan, mends: list[str]) -> str:
    """The plan for a program."""
    return json.dumps(
        {
            "device": plan.device.key,
            "devices": plan.devices,
            "memory_bytes": plan.device.memory_bytes,
            "parameters": plan.model_weights,
            "dtype": plan.limits.dtype,
            "ledger_bytes": dict(plan.ledger),
            "block_size": plan.block_size,
            "block_bytes": plan.block_bytes,
            "num_blocks": plan.num_blocks,
            "max_model_len": plan.max_model_len,
            "longest_fitting": plan.max_fitting,
            "kv_tokens": plan.kv_tokens,
            "concurrency": round(plan.concurrency, 2),
            "programs": len(plan.buckets),
            "decode_floor_ms": round(plan.decode_floor_s * 1e3, 3),
            "fits": plan.fits,
            "mends": mends,
        },
        indent=2,
    )


def _request_bytes(plan: Plan) -> int:
    return -(-plan.max_model_len // plan.block_size) * plan.block_bytes


def _mends(model: ModelConfig, plan: Plan) -> list[str]:
    """What would make it fit, each alone."""
    found = []
    if plan.max_fitting >= plan.block_size:
        found.append(f"--max-model-len {plan.max_fitting}")
    for fraction in (0.5, 0.3, 0.1, 0.05):
        limits = dataclasses.replace(plan.limits, graph_memory_fraction=fraction)
        if plan.ledger["programs"] and _fits(model, plan, limits, plan.devices):
            found.append(f"--graph-memory-fraction {fraction}")
            break
    for devices in (2, 4, 8, 16, 32, 64):
        if devices > plan.devices and _fits(model, plan, plan.limits, devices):
            found.append(f"--device {plan.device.key}x{devices}")
            break
    return found


def _fits(model: ModelConfig, plan: Plan, limits: Limits, devices: int) -> bool:
    try:
        return make_plan(model, plan.device, devices, limits).fits
    except TokenryError:  # it cannot be split so: no mend
        return False
