"""W5: the HTTP servers of tokenry and of the peers that this machine has, in turn.

    python benchmarks/cpu_servers.py MODEL [--rounds 5] [--engines tokenry llama.cpp vllm]
        [--precisions fp32 int8 int4] [--json FILE] [--markdown FILE]

Eight clients ask one after the other, 32 requests of 200 random ids, 64 tokens out, streamed. A
server is stopped (SIGSTOP) while another is asked. MODEL and the peers are those of
`cpu_peers.py`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from peers.machine import Usage, resident_mib
from peers.servers import PROMPT, REQUESTS, SERVED, Load, command, environment, load

MOST_DISTURBED = 0.05


class Server:
    """A server that only runs while it is asked."""

    def __init__(self, name: str, precision: str, args: argparse.Namespace) -> None:
        self.name, self.precision = name, precision
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = int(s.getsockname()[1])
        log = (args.logs / f"server-{name}-{precision}.log").open("w")
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            command(name, precision, args.model, self.port, args.threads, args.peers),
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment(name, args.threads),
        )
        self.group = {self._process.pid}
        while not self._healthy():
            time.sleep(0.05)
        self.start_s = time.perf_counter() - begin
        self.model = self._model()
        self.signal(signal.SIGSTOP)

    def _get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def _healthy(self) -> bool:
        if self._process.poll() is not None:
            raise SystemExit(f"{self.name} {self.precision} ended: see its log in --logs")
        try:
            return self._get("/health")[0] == 200
        except OSError:
            return False

    def _model(self) -> str:
        return str(json.loads(self._get("/v1/models")[1])["data"][0]["id"])

    def signal(self, number: int) -> None:
        """To all of its processes."""
        os.killpg(self._process.pid, number)

    def end(self) -> None:
        """Stop it for good."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGKILL)
        self._process.wait()


def one(server: Server, seed: str) -> tuple[Load, float]:
    """A round: the load, and the share of the machine that others took."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(5, 4000) for _ in range(PROMPT)] for _ in range(REQUESTS)]
    server.signal(signal.SIGCONT)
    before = Usage.now(server.group)
    found = load(server.port, server.model, prompts)
    disturbed = sum(Usage.now(server.group).since(before))
    server.signal(signal.SIGSTOP)
    print(f"{server.precision} {server.name}: {asdict(found)}, others {disturbed:.1%}", flush=True)
    return found, disturbed


def main() -> None:
    """Start all, ask all in turn, print medians and each round's rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", default=list(SERVED), choices=list(SERVED))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--peers", type=Path, default=Path("build/peers"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--logs", type=Path, default=Path("build/peers-logs"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    here = [n for n in args.engines if n == "tokenry" or (args.peers / n).exists()]
    servers = [Server(n, p, args) for p in args.precisions for n in here if p in SERVED[n]]
    rounds: dict[Server, list[tuple[Load, float]]] = {s: [] for s in servers}
    try:
        for number in range(args.rounds):
            for server, found in rounds.items():
                found.append(one(server, f"{number} {server.precision}"))
        resident = {s: resident_mib(s.group) for s in servers}
    finally:
        for server in servers:
            server.end()
    names = [f.name for f in fields(Load)]
    lines = [
        "| precision | server | "
        + " | ".join(names)
        + " | rates of the rounds | start s | peak MiB |"
    ]
    lines.append("|---|---|" + "---:|" * len(names) + "---|---:|---:|")
    for server, found in rounds.items():
        quiet = [x for x, others in found if others <= MOST_DISTURBED] or [x for x, _ in found]
        cells = [f"{statistics.median(getattr(x, n) for x in quiet):.1f}" for n in names]
        every = " ".join(f"{x.rate:.0f}" + ("" if o <= MOST_DISTURBED else "x") for x, o in found)
        head = f"| {server.precision} | {server.name} | " + " | ".join(cells)
        lines.append(f"{head} | {every} | {server.start_s:.1f} | {resident[server]:.0f} |")
    print("\n" + "\n".join(lines) + "\n(x: others took more than 5 % of the machine)")
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n")
    if args.json:
        told = {f"{s.name} {s.precision}": [asdict(x) for x, _ in f] for s, f in rounds.items()}
        args.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
