"""What this process may use of the machine: the control groups (v1 and v2, nested) and /proc.

In: a root directory (`/`, or a tree that a test made). Out: `MemoryInfo`, the CPU quota. Knows
nothing of torch.
A limit holds for a group and all groups below it, so the tightest on the way up to the root is
ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenry.backend.contract import MemoryInfo

UNLIMITED = 2**60
"""Version 1 says "no limit" by a number near 2**63."""


def read_memory(root: Path) -> MemoryInfo:
    """Total, free and used bytes.

    used is what this process holds (resident set); free is the least that any group on the way up,
    or the machine, still has (page cache that the kernel would give back counts as free).
    """
    machine = _meminfo(root)
    total = machine["MemTotal"]
    free = machine.get("MemAvailable", machine["MemFree"])
    for limit, usage, reclaimable in _limits(root):
        total = min(total, limit)
        free = min(free, limit - max(0, usage - reclaimable))
    return MemoryInfo(total=total, free=max(0, free), used=_resident(root))


def cpu_quota(root: Path) -> float | None:
    """CPUs that the tightest control group grants, None without a limit."""
    quotas = []
    for directory in _groups(root, "cpu"):
        text = _read(directory / "cpu.max")
        if text is not None:
            quota, period = text.split()
        else:
            quota = _read(directory / "cpu.cfs_quota_us") or "-1"
            period = _read(directory / "cpu.cfs_period_us") or "100000"
        if quota not in ("max", "-1"):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_nodes(root: Path, usable: Iterable[int]) -> list[list[int]]:
    """The CPUs of each memory node (NUMA) that are among `usable`, nodes without one left out."""
    allowed = set(usable)
    nodes = []
    base = root / "sys/devices/system/node"
    for directory in sorted(base.glob("node[0-9]*"), key=lambda d: int(d.name[4:])):
        cpus = [cpu for cpu in _cpu_list(_read(directory / "cpulist") or "") if cpu in allowed]
        if cpus:
            nodes.append(cpus)
    return nodes


def _cpu_list(text: str) -> Iterator[int]:
    """Numbers of a list such as 0-2,5."""
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first:
            yield from range(int(first), int(last or first) + 1)


def _limits(root: Path) -> Iterator[tuple[int, int, int]]:
    """(limit, usage, reclaimable page cache) of each limited group that holds this process."""
    for directory in _groups(root, "memory"):
        v2 = _read(directory / "memory.max")
        text = v2 if v2 is not None else _read(directory / "memory.limit_in_bytes")
        if text is None or text == "max" or int(text) >= UNLIMITED:
            continue
        usage = _read(directory / ("memory.current" if v2 is not None else "memory.usage_in_bytes"))
        stat = _pairs(_read(directory / "memory.stat") or "")
        cache = (
            stat.get("inactive_file", 0) if v2 is not None else stat.get("total_inactive_file", 0)
        )
        yield int(text), int(usage or 0), cache


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of this process's group and of every group above it, for version 1 and
    version 2.
    """
    base = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if controllers == "" and number == "0":
            tops = [base, base / "unified"]
        elif controller in controllers.split(","):
            tops = [base / controller, base / controllers]
        else:
            continue
        for top in dict.fromkeys(tops):
            parts = [part for part in path.split("/") if part not in ("", "..")]
            for depth in range(len(parts), -1, -1):  # a container may see its own group as the root
                directory = top.joinpath(*parts[:depth])
                if directory.is_dir():
                    yield directory


def _meminfo(root: Path) -> dict[str, int]:
    facts = {}
    for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        facts[key] = int(value.split()[0]) * 1024
    return facts


def reset_peak(root: Path) -> bool:
    """Start a new peak of the resident set (proc(5), clear_refs 5); False: not allowed."""
    try:
        (root / "proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def read_peak(root: Path) -> int:
    """Largest resident set of this process since the last reset, in bytes."""
    return _status(root, "VmHWM")


def _resident(root: Path) -> int:
    """Resident bytes of this process, from VmRSS (statm would need the page size)."""
    return _status(root, "VmRSS")


def _status(root: Path, field: str) -> int:
    for line in (root / "proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _pairs(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in text.splitlines() if line)}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
