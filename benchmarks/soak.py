"""Serve 2,000 requests of mixed lengths with shared prefixes, aborts and too little memory.

    python benchmarks/soak.py [--model demo] [--backend cpu] [--requests 2000] [--blocks 320]

Prints the requests by how they ended, preemptions, prefix-cache hits, KV waste (slots of allocated
blocks that hold no token), and the resident memory per eighth of the run. Exit status 1, with the
reason, if a request is unanswered, a block is leaked, the waste is 4 % or more, or memory grows.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import time
from collections.abc import Sequence

import psutil
from tqdm import tqdm

from tokenry.assemble import assemble
from tokenry.config import EngineConfig
from tokenry.engine.core import EngineCore
from tokenry.messages import AddRequest
from tokenry.params import SamplingParams


def make_requests(rng: random.Random, count: int, vocab: int) -> list[AddRequest]:
    """Mixed lengths; half of the prompts begin with one of four shared prefixes."""
    prefixes = [tuple(rng.randrange(5, vocab) for _ in range(n)) for n in (96, 160, 256, 320)]
    requests = []
    for i in range(count):
        own = tuple(rng.randrange(5, vocab) for _ in range(int(rng.lognormvariate(4.4, 0.8)) + 1))[
            :400
        ]
        prompt = (rng.choice(prefixes) if rng.random() < 0.5 else ()) + own
        params = SamplingParams(
            max_tokens=max(1, min(300, int(rng.lognormvariate(4.0, 0.7)))),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            seed=i,
            ignore_eos=True,
        )
        requests.append(
            AddRequest(
                request_id=f"soak-{i}", token_ids=prompt, params=params, priority=rng.randrange(3)
            )
        )
    return requests


MOST_WASTE = 0.04
MOST_GROWTH = 1.05
"""Of the resident memory, from the end of the second eighth (all shapes and blocks were used once)
to the end.
"""


def complaints(
    *, unanswered: int, leaked: float, waste: float, resident: Sequence[int]
) -> list[str]:
    """What is wrong with a run. leaked and waste: shares; resident: bytes, eighth by eighth."""
    found = []
    if unanswered:
        found.append(f"{unanswered} requests are not answered")
    if leaked:
        found.append(f"{leaked:.1%} of the KV is in use at the end")
    if waste >= MOST_WASTE:
        found.append(f"KV waste is {waste:.2%}, it must stay below {MOST_WASTE:.0%}")
    settled = resident[2:]
    if settled and settled[-1] > MOST_GROWTH * settled[0]:
        found.append(
            f"resident memory grew from {settled[0] / 2**20:.0f} to {settled[-1] / 2**20:.0f} MiB"
        )
    return found


class Soak:
    """Drives one engine through the load and keeps the score."""

    def __init__(self, engine: EngineCore, requests: list[AddRequest], rng: random.Random) -> None:
        self.engine = engine
        self.waiting = collections.deque(requests)
        self.rng = rng
        self.live: dict[str, int] = {}
        self.ended: collections.Counter[str] = collections.Counter()
        self.rss: list[int] = []
        self.waste: list[float] = []
        self.tokens = 0

    def run(self) -> None:
        """Keep about 48 requests in the engine; abort one now and then, at any moment of its
        life.
        """
        total = len(self.waiting)
        bar = tqdm(total=total, unit="req", disable=not sys.stderr.isatty())
        steps = 0
        while self.waiting or self.engine.has_work():
            while self.waiting and len(self.live) < 48:
                request = self.waiting.popleft()
                self.live[request.request_id] = 0
                self.engine.add(request)
            if self.live and self.rng.random() < 0.03:
                victim = self.rng.choice(sorted(self.live))
                self.engine.abort([victim])
                del self.live[victim]
                self.ended["aborted"] += 1
                bar.update()
            for event in self.engine.step():
                self.tokens += len(event.token_ids)
                if event.finish_reason and event.request_id in self.live:
                    del self.live[event.request_id]
                    self.ended[event.finish_reason] += 1
                    bar.update()
            steps += 1
            self.engine.check_integrity()
            if self.engine.stats().kv_usage > 0:
                self.waste.append(self.engine.kv_waste())
            if sum(self.ended.values()) * 8 // total >= len(self.rss):
                self.rss.append(psutil.Process().memory_info().rss)
        bar.close()


def main() -> int:
    """Run the soak and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--blocks", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    config = EngineConfig(
        model=args.model,
        backend=args.backend,
        num_kv_blocks=args.blocks,
        max_model_len=1024,
        max_num_seqs=32,
        max_num_batched_tokens=256,
        scheduling_policy="priority",
    )
    assembled = assemble(config)
    soak = Soak(assembled.engine, make_requests(rng, args.requests, vocab=4096), rng)
    begin = time.perf_counter()
    soak.run()
    seconds = time.perf_counter() - begin
    stats = assembled.engine.stats()
    answered = sum(soak.ended.values())
    leaked = stats.kv_usage
    mib = [f"{b / 2**20:.0f}" for b in soak.rss]
    print(f"requests answered     {answered} of {args.requests}: {dict(soak.ended)}")
    print(f"tokens drawn          {soak.tokens} in {seconds:.1f} s, {stats.steps} steps")
    print(f"preemptions           {stats.num_preemptions}")
    hits = stats.prefix_cache_hits / max(1, stats.prefix_cache_queries)
    print(f"prefix-cache hits     {stats.prefix_cache_hits} tokens, {hits:.1%} of those asked")
    waste = sum(soak.waste) / len(soak.waste)
    print(f"KV waste              mean {waste:.2%} of allocated slots")
    print(f"KV in use at the end  {leaked:.1%} (0: no leaked block; integrity checked every step)")
    print(f"resident MiB          {' '.join(mib)} (each eighth of the run)")
    assembled.engine.close()
    found = complaints(
        unanswered=args.requests - answered, leaked=leaked, waste=waste, resident=soak.rss
    )
    for complaint in found:
        print(f"FAILED: {complaint}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
