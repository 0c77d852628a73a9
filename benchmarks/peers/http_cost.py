"""What a server's HTTP side costs per streamed token: its CPU time, told apart from the engine's.

In: a running server. Out: a `Cost`. What the HTTP side is:

- tokenry, vLLM: the process that was started. The engine is a child of it, and is not counted; the
  detokenizer is part of the HTTP process in both.
- llama.cpp: one process. Its HTTP threads are those that take CPU time while nothing but /health is
  asked. The thread that runs the engine also makes text of tokens, and the ones that compute are
  others: neither is counted, so its figure lacks the detokenizer.

CPU time of threads is the scheduler's, in ns (/proc/PID/task/*/schedstat), of whole processes in
ticks of 10 ms, threads that ended included; user and system together. What other jobs on the
machine do changes it by their load on the caches alone.
"""

from __future__ import annotations

import http.client
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from peers.servers import OUT, load

PROBE_S, PROBERS = 2.0, 16
LEAST_NS = 200_000
"""A thread that took less during the probe answered nothing."""


@dataclass(frozen=True, slots=True)
class Cost:
    """us_per_token: of the HTTP side; engine_us_per_token: of all other threads and processes;
    idle: share of a core of all, while nobody asks; num_threads: of the HTTP side.
    """

    us_per_token: float
    engine_us_per_token: float
    idle: float
    num_threads: int


def cost(pid: int, port: int, model: str, prompts: list[list[int]], *, idle_s: float) -> Cost:
    """Of the server that was started as `pid`, which leads its process group."""
    load(port, model, prompts[:8])  # imports, caches, threads that start late
    found = _children(pid)
    only = None if found else _http_threads(pid, port)  # one process: its threads are told apart
    before, all_before_s = _thread_ns(pid), _group_s(pid)
    load(port, model, prompts)
    after, all_after_s = _thread_ns(pid), _group_s(pid)
    mine = [t for t in after if only is None or t in only]
    if only is not None and (late := set(after) - set(before)):
        print(f"{len(late)} threads began during the load and are counted as the engine's")
    http_ns = sum(after[t] - before.get(t, 0) for t in mine)
    tokens = len(prompts) * OUT
    time.sleep(2)
    idle_before_s = _group_s(pid)
    time.sleep(idle_s)
    return Cost(
        us_per_token=http_ns / tokens / 1e3,
        engine_us_per_token=((all_after_s - all_before_s) * 1e6 - http_ns / 1e3) / tokens,
        idle=(_group_s(pid) - idle_before_s) / idle_s,
        num_threads=sum(after[t] > before.get(t, 0) for t in mine),
    )


def _http_threads(pid: int, port: int) -> set[int]:
    """Threads that answer /health, asked by so many at once that each of a pool has its turn."""
    before, until_s = _thread_ns(pid), time.monotonic() + PROBE_S

    def probe() -> None:
        while time.monotonic() < until_s:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/health")
            connection.getresponse().read()
            connection.close()

    threads = [threading.Thread(target=probe) for _ in range(PROBERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = _thread_ns(pid)
    return {t for t, ns in after.items() if t != pid and ns - before.get(t, 0) > LEAST_NS}


def _thread_ns(pid: int) -> dict[int, int]:
    """CPU time so far of each thread of a process."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0])
        except OSError:  # it ended
            continue
    return found


def _group(pid: int) -> list[int]:
    """Processes of the group that `pid` leads."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended
            continue
        if int(fields[2]) == pid:
            found.append(int(process.name))
    return found


def _group_s(pid: int) -> float:
    """CPU time so far of all processes of the group."""
    ticks = 0
    for one in _group(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    """Other processes of its group that compute: those with more than a second of CPU time."""
    return [p for p in _group(pid) if p != pid and sum(_thread_ns(p).values()) > 1e9]
