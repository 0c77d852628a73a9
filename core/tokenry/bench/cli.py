"""Flags of `tokenry bench` and the way to the benchmarks, which are imported when they are
asked for.
"""

from __future__ import annotations

import argparse
import importlib
import math

from tokenry.config import EngineConfig
from tokenry.config import add_arguments as add_config
from tokenry.errors import ConfigError

KINDS = {
    "throughput": "many random prompts at once, in this process: tokens per second",
    "latency": "one batch of random prompts, in this process, several times: seconds",
    "serve": "a running OpenAI-compatible server under load: TTFT, TPOT, ITL, end to end",
    "compare": "two running servers under the same load, in turns: ratios of medians",
    "ramp": "prompts grow by a step until the server refuses; table, CSV and plot",
}


LEAST = {
    **dict.fromkeys(("input_len", "output_len", "num_prompts", "batch_size", "rounds"), 1),
    **dict.fromkeys(("step", "start", "max_concurrency"), 1),
    "request_rate": 0,
    "burstiness": 0.001,
}
"""Smallest value of each flag that a number is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A sub-command per benchmark."""
    commands = parser.add_subparsers(dest="bench", metavar="|".join(KINDS), required=True)
    for name, text in KINDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(parser=sub)
        if name == "compare":
            _compare_arguments(sub)
            continue
        running = name in ("serve", "ramp")
        first = "default: the server's first" if running else "default: demo"
        sub.add_argument("model", nargs="?", default=None if running else "demo", help=first)
        sub.add_argument("--json", help="file for the figures")
        if name == "ramp":
            _ramp_arguments(sub)
            continue
        _lengths(sub)
        if name == "serve":
            sub.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
            sub.add_argument("--api-key", default="", help="bearer token")
            _load_arguments(sub, num_prompts=100)
            continue
        if name == "throughput":
            sub.add_argument("--num-prompts", type=int, default=100, help="prompts (default: 100)")
        else:
            sub.add_argument("--batch-size", type=int, default=1, help="prompts (default: 1)")
            sub.add_argument("--rounds", type=int, default=5, help="measured rounds (default: 5)")
        add_config(sub, EngineConfig, skip=("model",))


def _lengths(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: 128)")
    sub.add_argument("--output-len", type=int, default=64, help="tokens drawn (default: 64)")


def _compare_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("urls", nargs=2, metavar="URL", help="the servers, A and B")
    sub.add_argument(
        "--models", nargs=2, metavar=("A", "B"), help="what to ask each for (default: its first)"
    )
    sub.add_argument(
        "--api-keys", nargs=2, default=["", ""], metavar=("A", "B"), help="bearer tokens"
    )
    sub.add_argument("--rounds", type=int, default=5, help="measured rounds (default: 5)")
    sub.add_argument("--json", help="file for the figures")
    _lengths(sub)
    _load_arguments(sub, num_prompts=32)


def _load_arguments(sub: argparse.ArgumentParser, *, num_prompts: int) -> None:
    sub.add_argument(
        "--num-prompts", type=int, default=num_prompts, help=f"requests (default: {num_prompts})"
    )
    sub.add_argument(
        "--request-rate", type=float, default=0.0, help="arrivals per second, 0: all at once"
    )
    sub.add_argument(
        "--burstiness", type=float, default=1.0, help="1: Poisson; less: burstier; more: evener"
    )
    sub.add_argument("--max-concurrency", type=int, default=64, help="open requests (default: 64)")


def _ramp_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--url", help="a running server; without it one is started for MODEL (default: demo)"
    )
    sub.add_argument("--step", type=int, default=128, help="tokens added each time (default: 128)")
    sub.add_argument("--start", type=int, default=128, help="tokens of the first prompt")
    sub.add_argument("--output-len", type=int, default=32, help="tokens drawn each time")
    sub.add_argument("--csv", help="file for the table")
    sub.add_argument("--plot", help="file for the plot, as ramp.png")
    sub.add_argument("--api-key", default="", help="bearer token")


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark; 0 if it measured what it should. Raises ConfigError for a count
    that measures nothing.
    """
    for name, least in LEAST.items():
        value = getattr(args, name, least)
        if not least <= value < math.inf:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} is {value:g}, it must be at least {least:g}.", mend=f"{flag} N"
            )
    home = {"throughput": "offline", "latency": "offline"}.get(args.bench, args.bench)
    module = importlib.import_module(f"tokenry.bench.{home}")
    from tokenry.bench.outputs import Outputs

    with Outputs.open(args) as outputs:
        status: int = getattr(module, args.bench)(args, outputs)
    return status
