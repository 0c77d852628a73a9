"""`tokenry run-batch`: a file of requests answered here, without a server.

In: the JSONL that /v1/batches takes. Out: the JSONL that it gives, answers and errors in one file,
as vLLM's run-batch writes it. The lines go through the server's own routes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from tokenry.api.app import ENDPOINTS, make_app
from tokenry.api.batch_lines import Line, Result, answer_line, read_lines, run_lines
from tokenry.api.batches_api import URLS
from tokenry.api.desk import Desk
from tokenry.api.disk import append, cut_to_whole_lines
from tokenry.api.fleet import Fleet
from tokenry.api.router import Router
from tokenry.api.tracing import make_tracer
from tokenry.config import EngineConfig, ServerConfig, add_arguments, check_file_keys, load
from tokenry.engine_process import DEFAULT_FACTORY
from tokenry.errors import ConfigError
from tokenry.messages import Progress
from tokenry.startup import StartLog, follow


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("-i", "--input", required=True, help="file of requests, one JSON per line")
    parser.add_argument("-o", "--output", required=True, help="file that the answers are added to")
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these options")
    text = "most requests at once (default: as many as one step takes)"
    parser.add_argument("--at-once", type=int, help=text)
    text = "go on where an earlier run ended: lines answered in the output are not asked again"
    parser.add_argument("--resume", action="store_true", help=text)
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    add_arguments(parser, EngineConfig)
    parser.set_defaults(run=run_batch)


def run_batch(args: argparse.Namespace) -> int:
    """Answer the file; 1 if a line could not be answered."""
    names = set(EngineConfig.__dataclass_fields__)
    given = {name: value for name, value in vars(args).items() if name in names}
    if args.config:
        check_file_keys(args.config)
    engine = load(EngineConfig, given, file=args.config)
    source, target = Path(args.input), Path(args.output)
    if not source.is_file():
        raise ConfigError(f"There is no file {source}.", mend="-i FILE.jsonl")
    if target.exists() and target.stat().st_size and not args.resume:
        raise ConfigError(
            f"{target} exists already.", mend="--resume to go on with it, or another -o FILE"
        )
    if args.at_once is not None and args.at_once < 1:
        raise ConfigError(f"--at-once is {args.at_once}, it must be at least 1.")
    return asyncio.run(_run(engine, source, target, args))


async def _run(engine: EngineConfig, source: Path, target: Path, args: argparse.Namespace) -> int:
    served = [e.path for e in ENDPOINTS if e.path in URLS]
    lines = _lines(source, served, await asyncio.to_thread(_answered, target))
    config = ServerConfig()
    fleet = Fleet(
        [engine],
        config,
        tracer=make_tracer(None),
        factory=DEFAULT_FACTORY,
        say=lambda line: None,
    )
    counts = {True: 0, False: 0}
    try:
        await _load(fleet, quiet=args.quiet)
        app = Router(make_app(fleet, Desk.open(config)), fleet=fleet)
        model = fleet.first.name

        async def answer(line: Line) -> Result:
            return await answer_line(app, line, model=model)

        async def write(result: Result) -> None:
            await asyncio.to_thread(append, target, result.encoded())
            counts[result.ok] += 1
            if not args.quiet:
                _show(counts)

        async def may_start() -> None:
            return None

        at_once = args.at_once or engine.max_num_seqs
        await run_lines(lines, answer, write, may_start=may_start, at_once=at_once)
    finally:
        await fleet.shutdown()
    if not args.quiet:
        print(f"\n{counts[True]} answered, {counts[False]} failed: {target}", file=sys.stderr)
    return 1 if counts[False] else 0


async def _load(fleet: Fleet, *, quiet: bool) -> None:
    loading = asyncio.create_task(fleet.load_all())
    try:
        if not quiet:
            await follow(StartLog(), lambda: _progress(fleet), loading)
        await loading
    finally:
        loading.cancel()


def _progress(fleet: Fleet) -> Progress:
    return fleet.first.service.engine.progress


def _lines(source: Path, urls: list[str], skipped: set[str]) -> Iterator[Line]:
    """The lines to ask. Raises ConfigError if one is wrong, before any is asked."""
    wrong = [one for one in read_lines(source, urls) if not isinstance(one, Line)]
    if wrong:
        first = wrong[0]
        raise ConfigError(
            f"{source} has {len(wrong)} wrong lines. {first['message']} (line {first['line']})",
            mend="a JSON object per line with custom_id, url and body",
        )
    return (
        one
        for one in read_lines(source, urls)
        if isinstance(one, Line) and one.custom_id not in skipped
    )


def _answered(target: Path) -> set[str]:
    """The custom_ids that the output has already."""
    cut_to_whole_lines(target)
    lines: list[Any] = target.read_bytes().splitlines() if target.exists() else []
    return {msgspec.json.decode(line)["custom_id"] for line in lines}


def _show(counts: dict[bool, int]) -> None:
    text = f"\r{counts[True]} answered, {counts[False]} failed"
    print(text, end="", file=sys.stderr, flush=True)
