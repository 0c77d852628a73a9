"""`tokenry bench serve`: a running server under load."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time

import httpx2
from tqdm import tqdm

from tokenry.bench.client import complete, open_client
from tokenry.bench.figures import Timeline, latencies, latency_table
from tokenry.bench.outputs import Outputs
from tokenry.errors import ConfigError

TOKEN_IDS = (10, 1000)
"""Random prompts take these ids, which every vocabulary has."""


def serve(args: argparse.Namespace, outputs: Outputs) -> int:
    """Send the load, print the table; 1 if any request failed."""
    begin = time.perf_counter()
    model, timelines = asyncio.run(_load(args))
    seconds = time.perf_counter() - begin
    done = [t for t in timelines if t.error is None]
    drawn = sum(len(t.token_s) for t in done)
    figures: dict[str, object] = {
        "requests": len(done),
        "failures": len(timelines) - len(done),
        "seconds": seconds,
        "requests_per_s": len(done) / seconds,
        "output_tokens_per_s": drawn / seconds,
        "total_tokens_per_s": (drawn + sum(t.num_prompt for t in done)) / seconds,
    }
    for name, value in figures.items():
        print(f"{name:<22}{value:>12.2f}")
    spreads = latencies(timelines)
    print(latency_table(spreads))
    for error in sorted({t.error for t in timelines if t.error}):
        print(f"failed: {error}", file=sys.stderr)
    outputs.json({"model": model, "url": args.url, **figures, **spreads})
    return int(len(done) != len(timelines))


def arrivals(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Seconds after the start at which requests arrive: gamma-distributed gaps of mean 1 / rate
    (Poisson at 1).
    """
    if rate <= 0:
        return [0.0] * count
    now, times = 0.0, []
    for _ in range(count):
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    return times


async def _load(args: argparse.Namespace) -> tuple[str, list[Timeline]]:
    rng = random.Random(0)
    async with open_client(args.url, args.api_key) as client:
        model = await served_model(client, args.model)
        prompts = random_prompts(args.num_prompts, args.input_len, rng)
        times = arrivals(args.num_prompts, args.request_rate, args.burstiness, rng)
        return model, await send_all(client, model, prompts, times, args)


def random_prompts(count: int, length: int, rng: random.Random) -> list[list[int]]:
    """So many prompts of so many random tokens."""
    return [[rng.randrange(*TOKEN_IDS) for _ in range(length)] for _ in range(count)]


async def send_all(
    client: httpx2.AsyncClient,
    model: str,
    prompts: list[list[int]],
    times: list[float],
    args: argparse.Namespace,
) -> list[Timeline]:
    """Each prompt at its time (seconds from now), args.max_concurrency at once at most, with
    args.output_len tokens to draw.
    """
    gate = asyncio.Semaphore(args.max_concurrency)
    bar = tqdm(total=len(prompts), unit="req", leave=False, disable=not sys.stderr.isatty())
    begin = time.perf_counter()

    async def one(at: float, prompt: list[int]) -> Timeline:
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        async with gate:
            timeline = await complete(client, model, prompt, args.output_len)
        bar.update()
        return timeline

    pairs = zip(times, prompts, strict=True)
    timelines = await asyncio.gather(*(one(at, prompt) for at, prompt in pairs))
    bar.close()
    return list(timelines)


async def served_model(client: httpx2.AsyncClient, wanted: str | None) -> str:
    """The name to ask for: the first, unless one is wanted. Raises ConfigError if it is not
    served, nobody answers or the key is wrong.
    """
    try:
        answer = await client.get("/v1/models")
        if answer.status_code in (401, 403):
            raise ConfigError(
                f"{client.base_url} refuses the API key (status {answer.status_code}).",
                mend="--api-key KEY, as the server was started with",
            )
        answer.raise_for_status()
    except httpx2.HTTPError as error:
        raise ConfigError(
            f"{client.base_url} does not serve models: {error}.",
            mend="start one with `tokenry serve`, or --url http://HOST:PORT",
        ) from error
    names = [str(model["id"]) for model in answer.json()["data"]]
    if wanted is not None and wanted not in names:
        raise ConfigError(
            f"{client.base_url} does not serve {wanted!r}; it serves {', '.join(names)}.",
            mend=f"{names[0]} as MODEL, or none",
        )
    return names[0] if wanted is None else wanted
