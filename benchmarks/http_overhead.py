"""CPU time that the HTTP process spends per streamed token, and while nobody asks.

    python benchmarks/http_overhead.py --streams 64 --tokens 256

The real server with the demo model's tokenizer runs in front of an engine that computes nothing (a
hash gives the next token, a step takes `--step-ms`), in processes of their own. Counted is the CPU
time (user and system, by /proc) of the HTTP process alone: JSON, detokenising, server-sent events,
the socket to the engine. Wall time does not matter, so a busy machine gives the same figures.
Prints microseconds per token for chat and completions, and the idle share.

    python benchmarks/http_overhead.py --beside MODEL [--peers build/peers]
        [--engines tokenry llama.cpp vllm] [--requests 64]

measures tokenry, llama.cpp's and vLLM's servers in turn instead, each with a model that really
computes, as eight clients ask for streamed completions of 64 tokens; MODEL and the peers are those
of peers/README.md, and peers/http_cost.py tells how HTTP is told apart from the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenry.config import EngineConfig
from tokenry.engine.core import EngineCore
from tokenry.engine.limits import EngineLimits
from tokenry.messages import Ready
from tokenry.plan import RowResult, StepPlan, StepResult

SERVER = (
    "import sys; from tokenry.api.server import serve; "
    "from tokenry.config import EngineConfig, ServerConfig; "
    "sys.exit(serve(EngineConfig(model='demo', max_num_seqs=512), ServerConfig(port=0, "
    "log_level='warning'), factory='http_overhead:make'))"
)


class Runner:
    """Draws a token by arithmetic; keeps the last one of each request."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._last: dict[str, int] = {}

    def run(self, plan: StepPlan) -> Callable[[], StepResult]:
        """A step that takes its time without computing."""
        time.sleep(self._step_s)
        for request_id in plan.forget:
            self._last.pop(request_id, None)
        for new in plan.new:
            self._last[new.request_id] = new.token_ids[-1]
        rows = []
        for row in plan.rows:
            token = 300 + (self._last[row.request_id] * 31 + 7) % 1000
            self._last[row.request_id] = token
            rows.append(
                RowResult(request_id=row.request_id, token_ids=(token,) if row.sample else ())
            )
        result = StepResult(step=plan.step, rows=tuple(rows))
        return lambda: result


def make(config: EngineConfig, progress: Any) -> SimpleNamespace:
    """The engine process' factory."""
    limits = EngineLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=4096,
        num_blocks=100_000,
        block_size=16,
    )
    ready = Ready(
        max_model_len=4096,
        num_blocks=100_000,
        block_size=16,
        vocab_size=4096,
        backend="none",
        device_name="none",
        architecture="none",
        dtype="none",
        ledger={},
    )
    step_s = float(os.environ.get("HTTP_OVERHEAD_STEP_S", "0.02"))
    return SimpleNamespace(engine=EngineCore(limits, Runner(step_s)), ready=ready)


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(url: str, path: str, tokens: int) -> int:
    """One stream; how many events came."""
    import httpx2

    body: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, "stream": True}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "Once upon a time"}]
    else:
        body["prompt"] = "Once upon a time"
    with httpx2.stream("POST", url + path, json=body, timeout=600) as answer:
        return sum(line.startswith("data: {") for line in answer.iter_lines())


def measure(url: str, pid: int, path: str, streams: int, tokens: int) -> dict[str, float]:
    """CPU microseconds per token of so many streams at once."""
    counts: list[int] = []

    def one() -> None:
        counts.append(ask(url, path, tokens))

    before, begun = cpu_s(pid), time.monotonic()
    threads = [threading.Thread(target=one) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent_s = cpu_s(pid) - before
    assert len(counts) == streams and min(counts) >= tokens / 2, counts
    return {
        "us_per_token": spent_s / (streams * tokens) * 1e6,
        "tokens_per_s": streams * tokens / (time.monotonic() - begun),
        "events_per_token": sum(counts) / (streams * tokens),
    }


def beside(args: argparse.Namespace) -> None:
    """The servers' costs, as a table."""
    from cpu_servers import Server
    from peers.http_cost import cost

    args.logs.mkdir(parents=True, exist_ok=True)
    prompts = [[5 + (i * 31 + j * 7) % 4000 for j in range(16)] for i in range(args.requests)]
    results = {}
    for name in args.engines:
        if name != "tokenry" and not (args.peers / name).exists():
            print(f"{name}: not in {args.peers}, see benchmarks/peers/README.md")
            continue
        server = Server(name, "fp32", args)
        server.signal(signal.SIGCONT)
        try:
            (pid,) = server.group
            rounds = [
                cost(pid, server.port, server.model, prompts, idle_s=args.idle_s)
                for _ in range(args.rounds)
            ]
        finally:
            server.end()
        best = min(rounds, key=lambda one: one.us_per_token)
        results[name] = [asdict(one) for one in rounds]
        every = ", ".join(f"{one.us_per_token:.1f}" for one in rounds)
        print(
            f"{name:10} HTTP {best.us_per_token:6.1f} us/token (rounds: {every}) in "
            f"{best.num_threads} threads, engine {best.engine_us_per_token:.0f} us/token, "
            f"idle {best.idle:.2%} of a core",
            flush=True,
        )
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle-s", type=float, default=10.0)
    parser.add_argument("--out", help="JSON file of the results")
    parser.add_argument("--beside", type=Path, metavar="MODEL", dest="model")
    parser.add_argument("--engines", nargs="+", default=["tokenry", "llama.cpp", "vllm"])
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--logs", type=Path, default=Path("build/peers-logs"))
    args = parser.parse_args()
    if args.model is not None:
        beside(args)
        return
    environ = {
        **os.environ,
        "HTTP_OVERHEAD_STEP_S": str(args.step_ms / 1e3),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
        ),
    }
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stderr=subprocess.PIPE, text=True, env=environ
    )
    assert server.stderr is not None
    try:
        url = ""
        for line in server.stderr:
            if found := re.search(r"listening on (\S+),", line):
                url = found[1]
            if line.startswith("page:"):
                break
        threading.Thread(target=server.stderr.read, daemon=True).start()
        results: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
        for path in ("/v1/chat/completions", "/v1/completions"):
            measure(url, server.pid, path, 4, 16)  # imports and caches
            rounds = [
                measure(url, server.pid, path, args.streams, args.tokens)
                for _ in range(args.rounds)
            ]
            best = min(rounds, key=lambda r: r["us_per_token"])
            results[path] = best
            every = ", ".join(f"{r['us_per_token']:.1f}" for r in rounds)
            print(
                f"{path:22} {best['us_per_token']:6.1f} us/token (rounds: {every}), "
                f"{best['tokens_per_s']:.0f} tokens/s, "
                f"{best['events_per_token']:.2f} events/token",
                flush=True,
            )
        time.sleep(2)
        before = cpu_s(server.pid)
        time.sleep(args.idle_s)
        results["idle_share"] = (cpu_s(server.pid) - before) / args.idle_s
        print(f"idle: {results['idle_share']:.2%} of a core")
        if args.out:
            Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    finally:
        server.terminate()
        server.wait(20)


if __name__ == "__main__":
    main()
