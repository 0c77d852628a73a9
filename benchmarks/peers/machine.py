"""What the machine gives now: its limits, and how much of it others take.

The limits are measured by `limits.c`, compiled here: memory read, fp32 FMA in registers and, where
the CPU has it, int8 VNNI, on 1 and on all threads; and by torch's matrix product (2,048 rows,
columns and inputs), the rate that an fp32 product of a well-known library reaches here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.c")
PRODUCT = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
a, b = torch.randn(2, 2048, 2048)
rates = []
for _ in range(9):
    begin = time.perf_counter()
    torch.mm(a, b)
    rates.append(2 * 2048**3 / (time.perf_counter() - begin) / 1e9)
print(round(max(rates)))
"""


def with_bytecode() -> dict[str, str]:
    """The environment for a process of any engine: without PYTHONDONTWRITEBYTECODE, so that the
    first start writes what an installation has from the beginning, and later ones read it. Where it
    is set, a package in a checkout would be compiled from source at every start.
    """
    return {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def limits(threads: int) -> dict[str, float]:
    """Rates by name, of one thread and of `threads`; empty without AVX-512 or a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "limits"
        command = [
            "cc",
            "-O3",
            "-funroll-loops",
            "-march=native",
            "-pthread",
            str(SOURCE),
            "-o",
            str(binary),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True)
            out = subprocess.run([binary, str(threads)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError):
            return {}
    rates = {name: float(value) for name, value in json.loads(out.stdout).items()}
    product = [sys.executable, "-c", PRODUCT, str(threads)]
    out = subprocess.run(product, check=True, capture_output=True, text=True)
    return rates | {f"fp32 torch.mm GFLOP/s, {threads} threads": float(out.stdout)}


@dataclass(frozen=True, slots=True)
class Usage:
    """Clock ticks since boot: of all CPUs, stolen by the hypervisor, of process groups."""

    total: int
    busy: int
    stolen: int
    own: int

    @classmethod
    def now(cls, groups: set[int]) -> Usage:
        """Counters of now; `own` adds up the processes of `groups` and this one."""
        fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        own = sum(_ticks(Path(p), groups) for p in Path("/proc").glob("[0-9]*"))
        idle = fields[3] + fields[4]
        return cls(sum(fields), sum(fields) - idle - fields[7], fields[7], own)

    def since(self, before: Usage) -> tuple[float, float]:
        """Shares of the machine that the hypervisor and foreign processes took."""
        total = max(1, self.total - before.total)
        foreign = (self.busy - before.busy) - (self.own - before.own)
        return (self.stolen - before.stolen) / total, max(0.0, foreign / total)


def _ticks(process: Path, groups: set[int]) -> int:
    """User and system ticks of a process of `groups`, or of this one; 0 of others."""
    try:
        fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
    except OSError:  # it ended
        return 0
    mine = int(fields[2]) in groups or process.name == str(os.getpid())
    return int(fields[11]) + int(fields[12]) if mine else 0


def resident_mib(groups: set[int]) -> float:
    """Greatest resident sets of the groups' processes, added up, in MiB."""
    total = 0.0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rsplit(")", 1)[1].split()[2]) in groups:
                status = (process / "status").read_text()
                total += int(status.split("VmHWM:")[1].split()[0]) / 1024
        except (OSError, IndexError):  # it ended, or is a thread of the kernel
            continue
    return total
