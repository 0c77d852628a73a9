"""Seconds from starting the process to the first streamed token and to readiness, as a user of the
server sees it.

    python benchmarks/startup.py [MODEL ...] [--runs 5] [--backend cpu]

Starts `tokenry serve MODEL` anew each time, polls /readyz, asks for one token, stops it. Medians of
the runs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from peers.machine import with_bytecode


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def ask(port: int, method: str, path: str, body: object = None) -> int | None:
    """The status of the answer once its first body byte is here; None while nobody listens."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        response.read(1)
        connection.close()
    except ConnectionError:
        return None
    return response.status


def measure(model: str, backend: str) -> tuple[float, float]:
    """Seconds to readiness and to the first token."""
    port = free_port()
    begin = time.perf_counter()
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tokenry",
            "serve",
            model,
            "--backend",
            backend,
            "--port",
            str(port),
        ],
        stdout=subprocess.DEVNULL,
        env=with_bytecode(),
    )
    try:
        while ask(port, "GET", "/readyz") != 200:
            if server.poll() is not None:
                raise SystemExit(f"the server ended with status {server.returncode}")
            time.sleep(0.02)
        ready = time.perf_counter() - begin
        body = {"model": model, "prompt": [0, 300, 301], "max_tokens": 1, "stream": True}
        assert ask(port, "POST", "/v1/completions", body) == 200
        return ready, time.perf_counter() - begin
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["demo"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--backend", default="cpu")
    args = parser.parse_args()
    for model in args.models:
        times = [measure(model, args.backend) for _ in range(args.runs)]
        ready, first = (statistics.median(t[i] for t in times) for i in (0, 1))
        spread = f"{min(t[1] for t in times):.2f} .. {max(t[1] for t in times):.2f}"
        print(
            f"{model}: ready {ready:.2f} s, first token {first:.2f} s "
            f"(median of {args.runs}; {spread})"
        )


if __name__ == "__main__":
    main()
