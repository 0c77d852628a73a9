"""`tokenry bench ramp`: prompts grow by a step until the server refuses.

The refusal that ends it well is a 400 with code context_length_exceeded; the server must live on.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tokenry.bench.client import complete, open_client
from tokenry.bench.outputs import Outputs
from tokenry.bench.serve import TOKEN_IDS, served_model
from tokenry.errors import ConfigError

HEADER = ("Tokens in prompt", "Tokens generated", "Total tokens", "Time (s)", "Speed (tokens/s)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One request of the ramp."""

    num_prompt: int
    num_output: int
    seconds: float

    @property
    def cells(self) -> tuple[int, int, int, float, float]:
        """In the order of HEADER."""
        total = self.num_prompt + self.num_output
        speed = round(self.num_output / self.seconds, 2)
        return self.num_prompt, self.num_output, total, round(self.seconds, 3), speed


def ramp(args: argparse.Namespace, outputs: Outputs) -> int:
    """Climb, print, write; 0 if a too long prompt was what ended it and the server still
    answers.
    """
    kind = _picture_kind(args.plot)
    with _server(args) as url:
        rungs, end, alive = asyncio.run(_climb(args, url))
    print(f"ended by: {end}")
    print("the server lives on" if alive else "the server does not answer any more")
    outputs.csv([HEADER, *(rung.cells for rung in rungs)])
    if kind is not None:
        outputs.plot(picture(rungs, kind))
    outputs.json({"rungs": [rung.cells for rung in rungs], "ended_by": end})
    for path in filter(None, (args.csv, args.plot, args.json)):
        print(f"wrote {Path(path).resolve()}")
    return 0 if "context_length_exceeded" in end and alive else 1


async def _climb(args: argparse.Namespace, url: str) -> tuple[list[Rung], str, bool]:
    print(" | ".join(HEADER))
    rng = random.Random(0)
    rungs: list[Rung] = []
    async with open_client(url, args.api_key) as client:
        model = await served_model(client, args.model)
        length = args.start
        while True:
            prompt = [rng.randrange(*TOKEN_IDS) for _ in range(length)]
            timeline = await complete(client, model, prompt, args.output_len)
            if timeline.error is not None:
                health = await client.get("/health")
                return rungs, timeline.error, health.status_code == 200
            rung = Rung(
                num_prompt=length, num_output=len(timeline.token_s), seconds=timeline.e2el_s
            )
            rungs.append(rung)
            cells = zip(HEADER, rung.cells, strict=True)
            print(" | ".join(f"{cell:>{len(name)}}" for name, cell in cells), flush=True)
            length += args.step


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    """The given server, or one of our own for the model."""
    if args.url:
        yield args.url
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "tokenry", "serve", args.model or "demo", "--port", str(port)]
    process = subprocess.Popen(command, stdout=2)  # the table alone goes to stdout
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if httpx2.get(f"{url}/readyz").status_code == 200:
                return
        except httpx2.TransportError:
            pass  # nobody listens yet: the loop ends when the process does
        time.sleep(0.1)
    raise ConfigError(f"The server ended with status {process.returncode} before it was ready.")


def _picture_kind(path: str | None) -> str | None:
    """As in "ramp.png"; None for no picture. Raises ConfigError if it cannot be drawn."""
    if not path:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ConfigError(
            f"--plot {path}: matplotlib, which draws it, is not installed.",
            mend='pip install "tokenry[bench]", or no --plot',
        ) from error
    kind = path.rpartition(".")[2].lower()
    known = FigureCanvasAgg.get_supported_filetypes()
    if kind not in known:
        raise ConfigError(
            f"--plot {path}: no picture of this kind can be drawn.",
            mend=f"a name that ends in one of {', '.join(sorted(known))}, or no --plot",
        )
    return kind


def picture(rungs: list[Rung], kind: str) -> bytes:
    """Speed and time over prompt length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    left = figure.subplots()
    right = left.twinx()
    lengths = [rung.num_prompt for rung in rungs]
    left.plot(lengths, [rung.cells[4] for rung in rungs], marker="o", label="tokens/s")
    right.plot(lengths, [rung.seconds for rung in rungs], marker="x", color="tab:red", label="s")
    left.set_xlabel("tokens in prompt")
    left.set_ylabel("speed (tokens/s)")
    right.set_ylabel("time (s)")
    left.grid(alpha=0.3)
    figure.legend(loc="upper center", ncols=2)
    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=120, bbox_inches="tight")
    return file.getvalue()
