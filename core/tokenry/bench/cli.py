"""Flags of `tokenry bench` and the way to the four benchmarks, which are imported when they are
asked for.
"""

from __future__ import annotations

import argparse
import importlib

from tokenry.config import EngineConfig
from tokenry.config import add_arguments as add_config

KINDS = {
    "throughput": "many random prompts at once, in this process: tokens per second",
    "latency": "one batch of random prompts, in this process, several times: seconds",
    "serve": "a running OpenAI-compatible server under load: TTFT, TPOT, ITL, end to end",
    "ramp": "prompts grow by a step until the server refuses; table, CSV and plot",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A sub-command per benchmark."""
    commands = parser.add_subparsers(dest="bench", metavar="|".join(KINDS), required=True)
    for name, text in KINDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("model", nargs="?", default="demo", help="model (default: demo)")
        sub.add_argument("--json", help="file for the figures")
        if name == "ramp":
            _ramp_arguments(sub)
            continue
        sub.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: 128)")
        sub.add_argument("--output-len", type=int, default=64, help="tokens drawn (default: 64)")
        if name == "serve":
            _serve_arguments(sub)
            continue
        if name == "throughput":
            sub.add_argument("--num-prompts", type=int, default=100, help="prompts (default: 100)")
        else:
            sub.add_argument("--batch-size", type=int, default=1, help="prompts (default: 1)")
            sub.add_argument("--rounds", type=int, default=5, help="measured rounds (default: 5)")
        add_config(sub, EngineConfig, skip=("model",))


def _serve_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    sub.add_argument("--num-prompts", type=int, default=100, help="requests (default: 100)")
    sub.add_argument(
        "--request-rate", type=float, default=0.0, help="arrivals per second, 0: all at once"
    )
    sub.add_argument(
        "--burstiness", type=float, default=1.0, help="1: Poisson; less: burstier; more: evener"
    )
    sub.add_argument("--max-concurrency", type=int, default=64, help="open requests (default: 64)")
    sub.add_argument("--api-key", default="", help="bearer token")


def _ramp_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--url", help="a running server; without it one is started for MODEL")
    sub.add_argument("--step", type=int, default=128, help="tokens added each time (default: 128)")
    sub.add_argument("--start", type=int, default=128, help="tokens of the first prompt")
    sub.add_argument("--output-len", type=int, default=32, help="tokens drawn each time")
    sub.add_argument("--csv", default="ramp.csv", help="table as CSV (default: ramp.csv)")
    sub.add_argument("--plot", default="ramp.png", help="plot, '' for none (default: ramp.png)")
    sub.add_argument("--api-key", default="", help="bearer token")


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark; 0 if it measured what it should."""
    home = {"throughput": "offline", "latency": "offline", "serve": "serve", "ramp": "ramp"}
    module = importlib.import_module(f"tokenry.bench.{home[args.bench]}")
    from tokenry.bench.outputs import Outputs

    with Outputs.open(args) as outputs:
        status: int = getattr(module, args.bench)(args, outputs)
    return status
