"""`tokenry conform NAME`: runs the kit, prints as it goes, writes the report.

In: parsed arguments. Out: exit code 0 (it conforms) or 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenry.backend.discovery import check_installed
from tokenry.errors import ConfigError

if TYPE_CHECKING:
    from tokenry.conformance.check import Result
    from tokenry.conformance.report import Report

STEPS = 1000
Told = Callable[["Result"], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("backend", help="an installed backend, or a simulator")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ID", help="these checks, e.g. C03 C12.kv"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"random steps of C10 (default: {STEPS})"
    )
    parser.add_argument(
        "--backend-option", action="append", default=[], metavar="KEY=VALUE",
        help="for the backend, may be given more than once",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")


def run(args: argparse.Namespace) -> int:
    """Run it."""
    check_installed(args.backend)
    from tokenry.conformance.catalog import CHECKS
    from tokenry.conformance.report import line

    width = max(len(one.id) for one in CHECKS)
    shown = sys.stderr.isatty()

    def begun(id: str, at: int, count: int) -> None:
        if shown:
            print(f"\r  {at + 1}/{count} {id:<{width}}", end="", file=sys.stderr, flush=True)

    def told(result: Result) -> None:
        if shown:
            print("\r" + " " * (width + 12) + "\r", end="", file=sys.stderr, flush=True)
        print(line(result, width), flush=True)

    report = conform(
        args.backend,
        options=_options(args.backend_option),
        only=args.only,
        steps=args.steps,
        begun=begun,
        told=told,
        opened=lambda report: print(report.heading(), flush=True),
    )
    print(report.summary())
    if args.json is not None:
        args.json.write_text(report.to_json(), encoding="utf-8")
    if args.html is not None:
        args.html.write_text(report.to_html(), encoding="utf-8")
    return 0 if report.conforms else 1


def conform(
    backend: str,
    *,
    options: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    steps: int = STEPS,
    begun: Callable[[str, int, int], None] = lambda id, at, count: None,
    told: Told = lambda result: None,
    opened: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Ask the backend all that its Caps allow to ask.

    Raises NoBackend or BackendError where it cannot even be opened, ConfigError where `only` names
    no check.
    """
    import dataclasses

    from tokenry.conformance.catalog import CHECKS
    from tokenry.conformance.check import pick, run_check
    from tokenry.conformance.kit import Kit
    from tokenry.conformance.report import Report, now

    try:
        wanted = pick(CHECKS, only)
    except KeyError as error:
        raise ConfigError(
            f"There is no check {error.args[0]!r}.",
            mend=f"one of {', '.join(one.id for one in CHECKS)}",
        ) from None
    with tempfile.TemporaryDirectory(prefix="conform-") as directory:
        kit = Kit(backend, options=options or {}, directory=Path(directory), steps=steps)
        report = Report(
            backend=backend,
            version=None if kit.probe is None else kit.probe.version,
            device=kit.device.name,
            options=dict(options or {}),
            caps=kit.caps,
            results=(),
            when=now(),
        )
        opened(report)
        results = []
        for at, one in enumerate(wanted):
            begun(one.id, at, len(wanted))
            results.append(run_check(one, kit))
            told(results[-1])
    return dataclasses.replace(report, results=tuple(results))


def _options(given: Sequence[str]) -> dict[str, str]:
    for option in given:
        if "=" not in option:
            raise ConfigError(
                f"--backend-option {option!r} is not key=value.",
                mend="--backend-option key=value",
            )
    return dict(option.split("=", 1) for option in given)
