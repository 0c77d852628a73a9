"""Tiles that are measured, for shapes and architectures that nobody has tuned: found in warm-up,
kept in a file, only looked up in service.

In: a kernel's name, its shape in words, the table's tile and a function that launches a tile. Out:
the fastest tile. `timer` measures one launch in milliseconds; the tests bring their own. Knows
nothing of what the kernels compute.

The search goes one figure at a time (columns, rows, warps, stages) from the table's tile and keeps
what is faster by 2 % or more: 8 launches a shape, about, and the table's tile unless one is better.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import triton
from triton.runtime.errors import OutOfResources, PTXASError

from tokenry_triton.launch import Tile

log = logging.getLogger("tokenry.triton.tune")
BETTER = 0.98
"""A tile must take at most this share of the best one's time: less is noise."""
RANGES: Mapping[str, tuple[int, int]] = {
    "n": (16, 256), "m": (16, 128), "warps": (1, 8), "stages": (1, 5),
}  # fmt: skip
Launch = Callable[[Tile], object]
Timer = Callable[[Callable[[], object]], float]


def kernel_hash() -> str:
    """Of the source of all kernels: another one, and nothing measured holds any more."""
    found = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


class Tuner:
    """The tiles of one architecture. It is owned by the backend and asked by the ops.

    folder   where the file is: ARCH-TRITON'S VERSION-HASH OF THE KERNELS.json
    timer    milliseconds of a launch; called only inside `warm_up()`
    """

    def __init__(self, arch: str, folder: Path, timer: Timer) -> None:
        self.path = folder / f"{arch}-{triton.__version__}-{kernel_hash()}.json"
        self._timer = timer
        self._open = False
        self._known = _read(self.path)
        self.measured = 0

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """What is launched inside may be measured; afterwards it is in the file."""
        before, self._open = self.measured, True
        try:
            yield
        finally:
            self._open = False
            if self.measured > before:
                self._known = _write(self.path, self._known)

    def pick(
        self, kernel: str, shape: str, tile: Tile, launch: Launch, *, axes: str = "nmws"
    ) -> Tile:
        """The tile for a shape: the known one, else (in warm-up only) one found now, else `tile`.

        axes   letters of what may change: n, m, w(arps), s(tages).
        """
        key = f"{kernel} {shape}"
        if key in self._known:
            return self._known[key]
        if not self._open:
            return tile
        self.measured += 1
        self._known[key] = found = self._search(key, tile, launch, axes)
        return found

    def _search(self, key: str, tile: Tile, launch: Launch, axes: str) -> Tile:
        first = least = self._time(tile, launch)
        best = tile
        for name in (n for n in RANGES if n[0] in axes):
            for other in _neighbours(best, name):
                time = self._time(other, launch)
                if time < BETTER * least:
                    best, least = other, time
        log.info("%s: %s, %.3f ms; the table's: %.3f ms", key, best, least, first)
        return best

    def _time(self, tile: Tile, launch: Launch) -> float:
        """Infinite for one that the device has no room for, or its assembler no code."""
        try:
            return self._timer(lambda: launch(tile))
        except (OutOfResources, PTXASError):
            return float("inf")


def _neighbours(tile: Tile, name: str) -> list[Tile]:
    """One step down and one up: stages by one, the others by halves."""
    low, high = RANGES[name]
    now = getattr(tile, name)
    steps = (now - 1, now + 1) if name == "stages" else (now // 2, now * 2)
    return [replace(tile, **{name: value}) for value in steps if low <= value <= high]


def _read(path: Path) -> dict[str, Tile]:
    """What the file has; nothing, and a warning, where it cannot be read."""
    try:
        found = json.loads(path.read_text())
        return {str(key): Tile(**_whole(figures)) for key, figures in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s is not used: %s; it is written anew.", path, error)
        return {}


def _whole(figures: Mapping[str, int]) -> Mapping[str, int]:
    """Raises ValueError for a tile with anything but whole numbers in their ranges."""
    for name, value in figures.items():
        low, high = RANGES.get(name, (0, 1024))
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}, not a whole number of {low} to {high}")
    return figures


def _write(path: Path, known: Mapping[str, Tile]) -> dict[str, Tile]:
    """Known tiles with what another process found meanwhile, to the file whole or not at all."""
    merged = {**_read(path), **known}
    text = json.dumps({key: asdict(tile) for key, tile in sorted(merged.items())}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)
    except OSError as error:
        log.warning("%s cannot be written: %s; the next start measures again.", path, error)
    return merged
