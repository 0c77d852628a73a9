"""How many requests per second come within their latency targets: `slo` beside `fcfs`.

    python benchmarks/goodput.py --out F.json --plot F.png      # in simulated time, and a table
    python benchmarks/goodput.py --url http://127.0.0.1:8000 --scale 2    # a server that runs

One bursty load (`make_load`: seeded, so it is the same everywhere; --load FILE replays a recorded
one, --save FILE writes one) is replayed at several rates. In simulated time the real Scheduler
plans every step, and a step takes what a formula says that the policy does not know: a device with
an attention cost that its linear model lacks, and noise. Against a server the same requests are
sent at the same times, and the client holds the stop watch.

goodput   requests per second that met every target that they had.
capacity  the highest rate at which the given share of requests met theirs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tokenry.engine.limits import EngineLimits
from tokenry.engine.scheduler import Scheduler
from tokenry.messages import AddRequest
from tokenry.params import SamplingParams
from tokenry.plan import RowResult, StepPlan, StepResult

POLICIES = ("fcfs", "slo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request of a load; targets in milliseconds, None: none."""

    at_s: float
    prompt: int
    answer: int
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    deadline_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Seconds of a step, roughly an 8B model on one large accelerator."""

    base_s: float = 8e-3
    token_s: float = 40e-6
    request_s: float = 20e-6
    context_s: float = 6e-9
    noise: float = 0.05

    def seconds(self, plan: StepPlan, chance: random.Random) -> float:
        """Of this plan."""
        context = sum(row.num_computed + row.num_new for row in plan.rows)
        mean = self.base_s + self.token_s * plan.num_tokens
        mean += self.request_s * len(plan.rows) + self.context_s * context
        return mean * chance.lognormvariate(0, self.noise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a request came to, in seconds since its arrival."""

    ttft_s: float
    total_s: float

    def missed(self, wanted: Arrival) -> list[str]:
        """Names of the targets that were missed."""
        tpot_s = (self.total_s - self.ttft_s) / max(1, wanted.answer - 1)
        pairs = (
            ("ttft", wanted.ttft_ms, self.ttft_s),
            ("tpot", wanted.tpot_ms, tpot_s),
            ("deadline", wanted.deadline_ms, self.total_s),
        )
        return [name for name, most, took in pairs if most is not None and took * 1e3 > most]


def make_load(*, seconds: float, rate: float, seed: int) -> list[Arrival]:
    """A bursty mix: chats, completions in an editor, summaries, and some without any target.

    Arrivals are a Poisson process whose rate jumps: a quiet minute's rate is 0.6 of `rate`, and
    bursts of 2 to 12 s come with four times it, as in traces of real services (BurstGPT, arXiv
    2401.17644: burstiness is what breaks plans made for a mean).
    """
    chance = random.Random(seed)
    load: list[Arrival] = []
    now, burst_end, next_burst = 0.0, 0.0, chance.uniform(5, 15)
    while True:
        if now >= next_burst:
            burst_end = now + chance.uniform(2, 12)
            next_burst = burst_end + chance.expovariate(1 / 40)
        now += chance.expovariate(rate * (2.4 if now < burst_end else 0.6))
        if now >= seconds:
            return load
        load.append(_request(now, chance))


def _request(at_s: float, chance: random.Random) -> Arrival:
    def length(median: float, spread: float, most: int) -> int:
        return max(2, min(most, int(chance.lognormvariate(0, spread) * median)))

    kind = chance.random()
    if kind < 0.5:
        prompt, answer = length(400, 0.9, 4000), length(150, 0.6, 600)
        return Arrival(at_s=at_s, prompt=prompt, answer=answer, ttft_ms=1000, tpot_ms=60)
    if kind < 0.7:
        prompt, answer = length(1200, 0.5, 4000), length(30, 0.4, 80)
        return Arrival(at_s=at_s, prompt=prompt, answer=answer, deadline_ms=3000)
    if kind < 0.9:
        prompt, answer = length(5000, 0.4, 12000), length(200, 0.4, 500)
        return Arrival(at_s=at_s, prompt=prompt, answer=answer, ttft_ms=6000, tpot_ms=100)
    return Arrival(at_s=at_s, prompt=length(1500, 0.7, 8000), answer=length(200, 0.5, 600))


def faster(load: list[Arrival], scale: float) -> list[Arrival]:
    """The same requests at `scale` times their rate."""
    return [replace(arrival, at_s=arrival.at_s / scale) for arrival in load]


def shorter(load: list[Arrival], by: int) -> list[Arrival]:
    """The same requests with lengths divided, for a small model's context."""
    return [replace(a, prompt=max(1, a.prompt // by), answer=max(2, a.answer // by)) for a in load]


def simulate(
    load: list[Arrival], policy: str, device: Device, limits: EngineLimits, *, check: bool = False
) -> list[Outcome]:
    """Outcomes in the load's order, in simulated time; `check`: the books after every step."""
    now = 0.0
    scheduler = Scheduler(replace(limits, policy=policy), clock=lambda: now)
    chance = random.Random(1)
    coming = list(reversed(list(enumerate(load))))
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    while coming or scheduler.num_running or scheduler.num_waiting:
        while coming and coming[-1][1].at_s <= now:
            scheduler.add(_message(*coming.pop()))
        plan = scheduler.schedule()
        if plan is None:
            now = max(now, coming[-1][1].at_s)
            continue
        now += device.seconds(plan, chance)
        rows = tuple(
            RowResult(request_id=row.request_id, token_ids=(7,) if row.sample else ())
            for row in plan.rows
        )
        scheduler.update(plan, StepResult(step=plan.step, rows=rows))
        if check:
            scheduler.check_integrity()
        for event in scheduler.take_events():
            i = int(event.request_id)
            assert event.error is None, event
            first.setdefault(i, now)
            last[i] = now
    return [Outcome(ttft_s=first[i] - a.at_s, total_s=last[i] - a.at_s) for i, a in enumerate(load)]


def _message(i: int, a: Arrival) -> AddRequest:
    params = SamplingParams(
        max_tokens=a.answer,
        ignore_eos=True,
        ttft_target_ms=a.ttft_ms,
        tpot_target_ms=a.tpot_ms,
        deadline_ms=a.deadline_ms,
    )
    return AddRequest(request_id=str(i), token_ids=(5,) * a.prompt, params=params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One policy at one rate. `share`: of the requests with targets that met them all."""

    policy: str
    scale: float
    rate: float
    share: float
    goodput: float
    missed: dict[str, int]
    longest_s: float


def judge(load: list[Arrival], outcomes: list[Outcome], policy: str, scale: float) -> Result:
    """Goodput of what came of a load."""
    asked = [
        (a, o)
        for a, o in zip(load, outcomes, strict=True)
        if (a.ttft_ms, a.tpot_ms, a.deadline_ms) != (None,) * 3
    ]
    misses = [o.missed(a) for a, o in asked]
    within = sum(not names for names in misses)
    seconds = load[-1].at_s
    return Result(
        policy=policy,
        scale=scale,
        rate=len(asked) / seconds,
        share=within / len(asked),
        goodput=within / seconds,
        missed={n: sum(n in names for names in misses) for n in ("ttft", "tpot", "deadline")},
        longest_s=max(o.total_s for o in outcomes),
    )


def scale_where(load: list[Arrival], policy: str, share: float, at: Setting) -> float:
    """The scale at which this share of requests meets its targets, to 2 %."""
    low, high = 0.1, 0.2
    while at.run(load, policy, high).share > share:
        low, high = high, high * 1.5
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        if at.run(load, policy, middle).share > share:
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A device and an engine."""

    device: Device
    limits: EngineLimits

    def run(self, load: list[Arrival], policy: str, scale: float) -> Result:
        """One policy at one scale."""
        moved = faster(load, scale)
        return judge(moved, simulate(moved, policy, self.device, self.limits), policy, scale)


async def drive(load: list[Arrival], url: str, model: str | None) -> list[Outcome]:
    """The same load against a server, in real time."""
    import httpx2

    begun = time.monotonic()
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:

        async def ask(a: Arrival) -> Outcome:
            await asyncio.sleep(begun + a.at_s - time.monotonic())
            at_s = time.monotonic()
            body = {
                "model": model,
                "prompt": [300] * a.prompt,
                "max_tokens": a.answer,
                "ignore_eos": True,
                "stream": True,
                "ttft_target_ms": a.ttft_ms,
                "tpot_target_ms": a.tpot_ms,
                "deadline_ms": a.deadline_ms,
            }
            first_s = 0.0
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise SystemExit(f"{answer.status_code}: {answer.text}")
                async for line in answer.aiter_lines():
                    if line.startswith("data: {") and not first_s:
                        first_s = time.monotonic()
            return Outcome(ttft_s=first_s - at_s, total_s=time.monotonic() - at_s)

        return list(await asyncio.gather(*map(ask, load)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240.0, help="length of the load")
    parser.add_argument("--rate", type=float, default=8.0, help="mean requests per second")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--load", help="JSONL of a recorded load, instead of the generator")
    parser.add_argument("--save", help="write the load as JSONL and stop")
    parser.add_argument("--url", help="a server that runs, instead of simulated time")
    parser.add_argument("--model", help="which of the server's models")
    parser.add_argument("--scale", type=float, default=1.0, help="with --url: speed of the load")
    parser.add_argument("--shorter", type=int, default=1, help="divide all lengths by this")
    parser.add_argument("--out", help="JSON file of the results")
    parser.add_argument("--plot", help="PNG of goodput and share over the rate (extra [bench])")
    args = parser.parse_args()
    load = make_load(seconds=args.seconds, rate=args.rate, seed=args.seed)
    if args.load:
        lines = Path(args.load).read_text(encoding="utf-8").splitlines()
        load = [Arrival(**json.loads(line)) for line in lines]
    load = shorter(load, args.shorter)
    if args.save:
        text = "".join(json.dumps(asdict(arrival)) + "\n" for arrival in load)
        Path(args.save).write_text(text, encoding="utf-8")
        return
    if args.url:
        moved = faster(load, args.scale)
        outcomes = asyncio.run(drive(moved, args.url, args.model))
        show([judge(moved, outcomes, args.url, args.scale)])
        return
    results = compare(load, args.out)
    if args.plot:
        draw(results, args.plot)


def draw(results: list[Result], path: str) -> None:
    """Both policies over the rate: goodput, and the share within targets."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for policy in POLICIES:
        own = [r for r in results if r.policy == policy]
        rates = [r.rate for r in own]
        panels[0].plot(rates, [r.goodput for r in own], marker="o", label=policy)
        panels[1].plot(rates, [r.share * 100 for r in own], marker="o", label=policy)
    for panel, title in zip(panels, ("goodput, requests/s", "within targets, %"), strict=True):
        panel.set(xlabel="requests with targets per second", title=title, ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def compare(load: list[Arrival], out: str | None) -> list[Result]:
    """The table of both policies, in simulated time."""
    limits = EngineLimits(
        num_blocks=16384,
        block_size=16,
        max_model_len=16384,
        max_num_seqs=128,
        max_num_batched_tokens=2048,
        prefix_caching=False,
        overlap=False,
    )
    at = Setting(device=Device(), limits=limits)
    knee = scale_where(load, "fcfs", 0.8, at)
    capacity = {
        f"{policy} {share:.0%}": scale_where(load, policy, share, at)
        for share in (0.9, 0.8)
        for policy in POLICIES
    }
    scales = [knee * f for f in (0.75, 1.0, 1.25, 1.5, 2.0)]
    results = [at.run(load, policy, scale) for scale in scales for policy in POLICIES]
    show(results)
    for share in ("90%", "80%"):
        ours, theirs = capacity[f"slo {share}"], capacity[f"fcfs {share}"]
        print(f"capacity at {share}: slo / fcfs = {ours / theirs:.2f}")
    if out:
        data = {"results": [asdict(r) for r in results], "capacity_scale": capacity}
        Path(out).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return results


def show(results: list[Result]) -> None:
    """A table."""
    print("policy   rate/s  within targets  goodput/s   missed ttft/tpot/deadline   longest s")
    for r in results:
        missed = "/".join(str(r.missed[name]) for name in ("ttft", "tpot", "deadline"))
        print(
            f"{r.policy:8} {r.rate:6.2f}  {r.share:14.1%}  {r.goodput:9.2f}   {missed:25}   "
            f"{r.longest_s:9.1f}",
            file=sys.stdout,
            flush=True,
        )


if __name__ == "__main__":
    main()
