"""tokenry and the other engines that this machine has, on the same model, in turn.

    python benchmarks/cpu_peers.py MODEL [--rounds 5] [--engines tokenry llama.cpp openvino vllm]
        [--precisions fp32 bf16 int8 int4] [--workloads W1 W2 W3 W4] [--json FILE] [--markdown FILE]

MODEL is a directory of `make_model.py`, converted by `peers/convert.py`. A peer is found at
PEERS/<name> (default build/peers): `openvino` and `vllm` are environments with that package,
`llama.cpp` is the folder of its binaries.

Each engine is a process that is stopped (SIGSTOP) while another runs, so that all are measured
minutes apart in each round. W1: 1 request, 128 tokens in, 128 out, decode rate. W2: 32 at once,
256 in, 128 out. W3: 1 request, 2,048 in, 1 out. W4: 16 requests of 1,024 shared and 32 own
tokens, 32 out, nothing cached before; W4w: again, with other ends. Prompts are random ids, new in
every round. Cells are medians, ratios are medians of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from peers.engines import PRECISIONS
from peers.machine import Usage, limits, resident_mib, with_bytecode

HERE = Path(__file__).parent
UNITS = {"W1": "tok/s", "W2": "tok/s", "W3": "tok/s", "W4": "s", "W4w": "s"}
Prompts = list[list[int]]


class Peer:
    """One engine at one precision, in a process of its own that only runs while it is asked."""

    def __init__(self, name: str, precision: str, model: Path, args: argparse.Namespace) -> None:
        self.name, self.precision = name, precision
        python, environment = launch(name, args)
        log = (args.logs / f"{name}-{precision}.log").open("w")
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            [python, HERE / "peers" / "engines.py", name, model, precision, str(args.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env=with_bytecode() | environment,
        )
        self.group = {self._process.pid}
        self._answer()
        self.start_s = time.perf_counter() - begin
        self.pause()

    def _answer(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} {self.precision} ended: see its log in --logs")
        told: dict[str, object] = json.loads(line)
        if told.get("wrong_lengths"):
            raise SystemExit(f"{self.name} {self.precision}: answers of other lengths: {told}")
        return told

    def pause(self) -> None:
        """Stop all of its processes."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let them run."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def seconds(self, prompts: Prompts, max_tokens: int) -> float:
        """How long the engine took for all of them."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        return float(str(self._answer()["seconds"]))

    def end(self) -> None:
        """Stop it for good."""
        self.resume()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def launch(name: str, args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The Python of an engine, and variables that it needs."""
    if name in ("tokenry", "transformers"):
        return sys.executable, {}
    if name == "llama.cpp":
        return sys.executable, {"PEER_BIN": str(args.peers / name)}
    return str(args.peers / name / "bin" / "python"), {}


def is_here(name: str, args: argparse.Namespace) -> bool:
    """Whether this machine has it."""
    return name in ("tokenry", "transformers") or (args.peers / name).exists()


def random_ids(rng: random.Random, count: int) -> list[int]:
    """Ids that every vocabulary here has and that end nothing."""
    return [rng.randrange(5, 4000) for _ in range(count)]


def w1(peer: Peer, rng: random.Random) -> dict[str, float]:
    """Decode rate of one request."""
    short = statistics.median(peer.seconds([random_ids(rng, 128)], 1) for _ in range(3))
    return {"W1": 127 / (peer.seconds([random_ids(rng, 128)], 128) - short)}


def w2(peer: Peer, rng: random.Random) -> dict[str, float]:
    """Output rate of 32 requests at once."""
    return {"W2": 32 * 128 / peer.seconds([random_ids(rng, 256) for _ in range(32)], 128)}


def w3(peer: Peer, rng: random.Random) -> dict[str, float]:
    """Prompt rate."""
    return {"W3": 2048 / peer.seconds([random_ids(rng, 2048)], 1)}


def w4(peer: Peer, rng: random.Random) -> dict[str, float]:
    """Shared beginnings: cold, then with the beginning served before."""
    shared = random_ids(rng, 1024)
    cold = peer.seconds([shared + random_ids(rng, 32) for _ in range(16)], 32)
    warm = peer.seconds([shared + random_ids(rng, 32) for _ in range(16)], 32)
    return {"W4": cold, "W4w": warm}


WORKLOADS: dict[str, Callable[[Peer, random.Random], dict[str, float]]] = {
    "W1": w1,
    "W2": w2,
    "W3": w3,
    "W4": w4,
}


@dataclass(slots=True)
class Rounds:
    """values[engine, precision, figure]: one per round, None where others took over 5 %."""

    values: dict[tuple[str, str, str], list[float | None]] = field(default_factory=dict)
    disturbed: list[str] = field(default_factory=list)

    def add(self, peer: Peer, figures: dict[str, float], shares: tuple[float, float]) -> None:
        """One round of one workload; shares of the machine: stolen, foreign."""
        steal, foreign = shares
        for name, value in figures.items():
            told = f"{name} {peer.precision} {peer.name}: {value:.2f} {UNITS[name]}"
            told += f" (steal {steal:.1%}, foreign {foreign:.1%})"
            quiet = steal + foreign <= 0.05
            print(told + ("" if quiet else "  disturbed, not counted"), flush=True)
            if not quiet:
                self.disturbed.append(told)
            key = (peer.name, peer.precision, name)
            self.values.setdefault(key, []).append(value if quiet else None)

    def quiet(self, name: str, precision: str, figure: str) -> list[float]:
        """The rounds that count."""
        return [v for v in self.values.get((name, precision, figure), []) if v is not None]

    def ratio(self, precision: str, figure: str, peer: str) -> float | None:
        """Median of tokenry / peer over rounds that both have; above 1 tokenry is ahead."""
        ours = self.values.get(("tokenry", precision, figure), [])
        theirs = self.values.get((peer, precision, figure), [])
        both = [(a, b) for a, b in zip(ours, theirs, strict=False) if a and b]
        if not both:
            return None
        ratios = [a / b if UNITS[figure] == "tok/s" else b / a for a, b in both]
        return statistics.median(ratios)


def table(rounds: Rounds, engines: list[str], precisions: list[str]) -> str:
    """Markdown: per precision and figure, each engine's median and all rounds; the ratio to the
    best peer.
    """
    head = ["figure", "precision", *engines, "tokenry / best peer"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for figure, unit in UNITS.items():
        for precision in precisions:
            cells = []
            for name in engines:
                got = rounds.quiet(name, precision, figure)
                every = rounds.values.get((name, precision, figure), [])
                listed = " ".join("x" if v is None else f"{v:.4g}" for v in every)
                cells.append(f"**{statistics.median(got):.4g}** ({listed})" if got else "-")
            ratios = {n: rounds.ratio(precision, figure, n) for n in engines if n != "tokenry"}
            known = {n: r for n, r in ratios.items() if r is not None}
            if set(cells) == {"-"}:
                continue
            best = min(known, key=lambda n: known[n]) if known else None
            last = f"{known[best]:.2f} ({best})" if best else "-"
            row = [f"{figure} {unit}", precision, *cells, last]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    default = ["tokenry", "llama.cpp", "openvino", "vllm"]
    parser.add_argument("--engines", nargs="+", default=default, choices=list(PRECISIONS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--logs", type=Path, default=Path("build/peers-logs"))
    parser.add_argument("--give-up", type=float, default=2.5, help=(
        "a peer so many times behind the best in two rounds of a workload is asked no more"
    ))  # fmt: skip
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def hopeless(rounds: Rounds, peer: Peer, figure: str, times: float) -> bool:
    """Whether two rounds showed it far behind the best at this precision."""
    got = rounds.quiet(peer.name, peer.precision, figure)
    if len(got) < 2 or peer.name == "tokenry":
        return False
    keys = [k for k in rounds.values if k[1:] == (peer.precision, figure)]
    medians = [statistics.median(rounds.quiet(*k)) for k in keys if rounds.quiet(*k)]
    mine = statistics.median(got)
    return max(medians) / mine > times if UNITS[figure] == "tok/s" else mine / min(medians) > times


def measure(peers: list[Peer], args: argparse.Namespace) -> Rounds:
    """All rounds: every workload at every precision, each peer in turn."""
    rounds = Rounds()
    for number in range(args.rounds):
        for workload in args.workloads:
            for precision in args.precisions:
                for peer in (p for p in peers if p.precision == precision):
                    if hopeless(rounds, peer, workload, args.give_up):
                        continue
                    rng = random.Random(f"{number} {workload} {precision}")
                    peer.resume()
                    before = Usage.now(peer.group)
                    figures = WORKLOADS[workload](peer, rng)
                    shares = Usage.now(peer.group).since(before)
                    peer.pause()
                    rounds.add(peer, figures, shares)
    return rounds


def main() -> None:
    """Start all, measure, print."""
    args = parse()
    args.logs.mkdir(parents=True, exist_ok=True)
    engines = [name for name in args.engines if is_here(name, args)]
    for name in sorted(set(args.engines) - set(engines)):
        print(f"{name}: not here ({args.peers / name})")
    before = limits(args.threads)
    peers = []
    for precision in args.precisions:
        for name in engines:
            if precision in PRECISIONS[name]:
                peers.append(Peer(name, precision, args.model, args))
                print(
                    f"{name} {precision}: first token after {peers[-1].start_s:.1f} s", flush=True
                )
    try:
        rounds = measure(peers, args)
        resident = {f"{p.name} {p.precision}": resident_mib(p.group) for p in peers}
    finally:
        for peer in peers:
            peer.end()
    after = limits(args.threads)
    told = table(rounds, engines, args.precisions)
    starts = {f"{p.name} {p.precision}": p.start_s for p in peers}
    lines = [told, "", "| engine | start to first token s | peak RSS MiB |", "|---|---|---|"]
    lines += [f"| {n} | {starts[n]:.1f} | {resident[n]:.0f} |" for n in starts]
    lines += ["", "| limit | before | after |", "|---|---|---|"]
    lines += [f"| {n} | {v} | {after.get(n, '-')} |" for n, v in before.items()]
    print("\n" + "\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")
    if args.json:
        flat = {" ".join(k): v for k, v in rounds.values.items()}
        about = {"machine": platform.processor() or platform.machine(), "command": sys.argv}
        about["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        result = {"about": about, "rounds": flat, "start_s": starts, "peak_rss_mib": resident}
        result |= {"limits_before": before, "limits_after": after, "disturbed": rounds.disturbed}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
