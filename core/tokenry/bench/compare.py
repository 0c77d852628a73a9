"""`tokenry bench compare`: two running servers under the same load, in turns.

In: two URLs of OpenAI-compatible servers. Out: every round's figures of both, and the ratios of
their medians, B to A. A machine's mood changes within minutes, so the servers take turns, and who
begins changes from round to round; the prompts of a round are the same for both and no round's are
another's, so that no cache of prompts answers. A round before the first warms both, unshown.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tokenry.bench.client import open_client
from tokenry.bench.figures import Timeline, latencies
from tokenry.bench.outputs import Outputs
from tokenry.bench.serve import arrivals, random_prompts, send_all, served_model
from tokenry.errors import TokenryError


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One server's figures in one round: the latencies are medians over its requests.

    None where no request gave the figure.
    """

    output_tokens_per_s: float
    ttft_ms: float | None
    tpot_ms: float | None
    e2el_ms: float | None
    output_tokens: int
    failures: int


MEASURES = ("output_tokens_per_s", "ttft_ms", "tpot_ms", "e2el_ms")


def compare(args: argparse.Namespace, outputs: Outputs) -> int:
    """Run the rounds, print the table; 1 if any request failed."""
    models, rounds = asyncio.run(_rounds(args))
    a, b = rounds
    ratios = {name: ratio(values(a, name), values(b, name)) for name in MEASURES}
    print(_table(args.urls, rounds, ratios))
    drawn = [sum(r.output_tokens for r in one) for one in rounds]
    if drawn[0] != drawn[1]:
        print(
            f"the answers are not equally long: {drawn[0]} and {drawn[1]} tokens; "
            "a server that ends early, or sends several in one event, is not measured by the same "
            "work",
            file=sys.stderr,
        )
    servers = [
        {"url": url, "model": model, "rounds": [asdict(r) for r in one]}
        for url, model, one in zip(args.urls, models, rounds, strict=True)
    ]
    load = ("num_prompts", "input_len", "output_len", "request_rate", "burstiness")
    told = {name: getattr(args, name) for name in (*load, "max_concurrency")}
    outputs.json({"load": told, "servers": servers, "ratios_b_to_a": ratios})
    return int(any(r.failures for one in rounds for r in one))


def values(rounds: Sequence[Round], name: str) -> list[float]:
    """One measure of all rounds that have it."""
    return [value for r in rounds if (value := getattr(r, name)) is not None]


def ratio(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The median of b to that of a; None where there is none, or where a's is 0."""
    below = statistics.median(a) if a else 0.0
    return statistics.median(b) / below if b and below else None


def round_of(timelines: Sequence[Timeline], seconds: float) -> Round:
    """What one server's requests of one round, `seconds` long, came to."""
    done = [t for t in timelines if t.error is None]
    drawn = sum(len(t.token_s) for t in done)
    medians = {name: 1000 * spread.p50 for name, spread in latencies(timelines).items()}
    return Round(
        output_tokens_per_s=drawn / seconds,
        ttft_ms=medians.get("TTFT"),
        tpot_ms=medians.get("TPOT"),
        e2el_ms=medians.get("E2EL"),
        output_tokens=drawn,
        failures=len(timelines) - len(done),
    )


async def _rounds(args: argparse.Namespace) -> tuple[list[str], tuple[list[Round], list[Round]]]:
    """The names asked for, and the rounds of both servers. Raises TokenryError where a server
    answers nothing of the first round.
    """
    wanted = args.models or [None, None]
    found: tuple[list[Round], list[Round]] = ([], [])
    first, second = (open_client(*pair) for pair in zip(args.urls, args.api_keys, strict=True))
    async with first as a, second as b:
        clients = (a, b)
        models = [await served_model(c, name) for c, name in zip(clients, wanted, strict=True)]
        for number in range(args.rounds + 1):
            rng = random.Random(number)
            prompts = random_prompts(args.num_prompts, args.input_len, rng)
            times = arrivals(args.num_prompts, args.request_rate, args.burstiness, rng)
            for which in (0, 1) if number % 2 else (1, 0):
                begin = time.perf_counter()
                timelines = await send_all(clients[which], models[which], prompts, times, args)
                seconds = time.perf_counter() - begin
                _check(args.urls[which], timelines)
                if number:
                    found[which].append(round_of(timelines, seconds))
    return models, found


def _check(url: str, timelines: Sequence[Timeline]) -> None:
    errors = sorted({t.error for t in timelines if t.error is not None})
    if errors and all(t.error is not None for t in timelines):
        raise TokenryError(
            f"{url} answered none of {len(timelines)} requests: {errors[0]}",
            mend="its prompts are lists of token ids; see --input-len and --output-len",
        )
    for error in errors:
        print(f"{url} failed: {error}", file=sys.stderr)


def _table(
    urls: Sequence[str],
    rounds: tuple[list[Round], list[Round]],
    ratios: dict[str, float | None],
) -> str:
    """All rounds of both, their medians, the ratios."""
    lines = [f"A: {urls[0]}", f"B: {urls[1]}"]
    lines.append(f"{'':<10}" + "".join(f"{name:>22}" for name in MEASURES))
    for number, pair in enumerate(zip(*rounds, strict=True), 1):
        for letter, one in zip("AB", pair, strict=True):
            cells = [_cell(getattr(one, name)) for name in MEASURES]
            lines.append(f"{number:<4}{letter:<6}" + "".join(cells))
    for letter, ofs in zip("AB", rounds, strict=True):
        medians = [
            _cell(statistics.median(found) if (found := values(ofs, name)) else None)
            for name in MEASURES
        ]
        lines.append(f"median {letter}  " + "".join(medians))
    lines.append(f"{'B / A':<10}" + "".join(_cell(ratios[name], 3) for name in MEASURES))
    return "\n".join(lines)


def _cell(value: float | None, digits: int = 2) -> str:
    return f"{'–':>22}" if value is None else f"{value:>22.{digits}f}"
