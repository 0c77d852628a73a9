"""The engines' own HTTP servers, and eight clients who ask one after the other (W5).

In: how to start a server, prompts as token ids. Out: a `Load`: output rate and latencies as the
clients see them. All servers speak OpenAI's /v1/completions with `stream`; requests are written and
read on plain sockets, so that the client costs little beside the server on the same cores.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from peers.engines import CONTEXT, SEQUENCES
from peers.machine import with_bytecode

CLIENTS, REQUESTS, PROMPT, OUT = 8, 32, 200, 64
DTYPES = {"fp32": "float32"} | dict.fromkeys(("bf16", "int8", "int4"), "bfloat16")
"""Of the KV, too: 16 bits, as llama.cpp has them, where the weights are quantised."""


def command(
    name: str, precision: str, model: Path, port: int, threads: int, peers: Path
) -> list[str]:
    """The command that starts an engine's server."""
    limits = [str(CONTEXT), str(SEQUENCES)]
    if name == "tokenry":
        quantized = ["--quantization", precision] if precision.startswith("int") else []
        return [
            *(sys.executable, "-m", "tokenry", "serve", str(model), "--port", str(port)),
            *("--backend", "cpu", "--backend-option", f"threads={threads}"),
            *("--max-model-len", limits[0], "--max-num-seqs", limits[1]),
            *("--dtype", DTYPES[precision], *quantized),
        ]
    if name == "llama.cpp":
        return [
            *(str(peers / name / "llama-server"), "-m", str(model / f"{precision}.gguf")),
            *("--port", str(port), "-t", str(threads), "-tb", str(threads), "-np", str(CLIENTS)),
            *("-c", str(CONTEXT * CLIENTS), "--no-kv-unified"),
        ]
    python = str(peers / name / "bin" / "python")
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--port", str(port), "--dtype", DTYPES[precision]),
        *("--max-model-len", limits[0], "--max-num-seqs", limits[1]),
    ]


SERVED = {
    "tokenry": ("fp32", "bf16", "int8", "int4"),
    "llama.cpp": ("fp32", "bf16", "int8", "int4"),
    "vllm": ("fp32", "bf16"),
}


def environment(name: str, threads: int) -> dict[str, str]:
    """Variables that a server needs."""
    own = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "2"}
    return with_bytecode() | (own if name == "vllm" else {"OMP_WAIT_POLICY": "passive"})


@dataclass(frozen=True, slots=True)
class Load:
    """Output tokens per second; time to the first token and between tokens, ms: median, 99 %."""

    rate: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float


def share(values: list[float], part: float) -> float:
    """The value below which `part` of them lie, nearest rank."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


async def _ask(port: int, model: str, prompt: list[int]) -> list[float]:
    """One streamed completion: when it was sent, then when each chunk with a choice came."""
    body = json.dumps({
        "model": model, "prompt": prompt, "max_tokens": OUT, "temperature": 0, "ignore_eos": True,
        "stream": True,
    })  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
    stamps = [time.perf_counter()]
    writer.write((head + body).encode())
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"port {port}: {status!r} {(await reader.read(2000))!r}")
    async for line in reader:
        if line.startswith(b"data: {") and b'"choices":[{' in line.replace(b" ", b""):
            stamps.append(time.perf_counter())
    writer.close()
    return stamps


async def _clients(port: int, model: str, prompts: list[list[int]]) -> list[list[float]]:
    waiting = list(prompts)
    answers: list[list[float]] = []

    async def client() -> None:
        while waiting:
            answers.append(await _ask(port, model, waiting.pop()))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answers


def load(port: int, model: str, prompts: list[list[int]]) -> Load:
    """All prompts through the clients."""
    begin = time.perf_counter()
    answers = asyncio.run(_clients(port, model, prompts))
    seconds = time.perf_counter() - begin
    first = [(a[1] - a[0]) * 1e3 for a in answers]
    # the last chunk of some servers carries the reason of the end and no token
    between = [(b - a) * 1e3 for s in answers for a, b in itertools.pairwise(s[1 : OUT + 1])]
    if min(len(a) for a in answers) < OUT * 3 // 4:
        raise SystemExit(f"port {port}: {min(len(a) for a in answers)} chunks for {OUT} tokens")
    return Load(
        rate=len(answers) * OUT / seconds,
        ttft_p50=statistics.median(first),
        ttft_p99=share(first, 0.99),
        itl_p50=statistics.median(between),
        itl_p99=share(between, 0.99),
    )
