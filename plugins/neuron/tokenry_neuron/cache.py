"""Which programs were compiled before, and on what each depends.

In: facts about a program (model, bucket, versions, ...). Out: whether an entry has exactly these
facts and its files are still there, or how the nearest entry differs. The compiler keeps what it
makes in `graphs/`; `programs/` has one JSON file per program with its facts and the names of the
compiler's files that appeared while it was made. Knows no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Facts = Mapping[str, Any]
"""JSON values by name; equal facts mean that the same program would be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A program of the cache. files: the compiler's, relative to its directory."""

    facts: Facts
    files: tuple[str, ...]


def digest(value: Any) -> str:
    """A short name for a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class ProgramCache:
    """A directory that several processes may share: entries are whole or absent."""

    def __init__(self, directory: Path, graphs: Path | None = None) -> None:
        self.directory = directory.expanduser()
        self.graphs = graphs or self.directory / "graphs"
        self._programs = self.directory / "programs"

    def files(self) -> frozenset[str]:
        """All of the compiler's files."""
        found = self.graphs.rglob("*") if self.graphs.is_dir() else ()
        return frozenset(str(f.relative_to(self.graphs)) for f in found if f.is_file())

    def find(self, facts: Facts) -> Entry | None:
        """The entry with these facts, if the compiler's files are all there."""
        entry = self._read(self._path(facts))
        if entry is None or digest(entry.facts) != digest(facts):
            return None
        return entry if all((self.graphs / name).is_file() for name in entry.files) else None

    def store(self, facts: Facts, files: Iterable[str]) -> None:
        """Remember the program; the file appears at once with its whole content."""
        path = self._path(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"facts": facts, "files": sorted(files)}, indent=1, default=str)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)

    def explain_miss(self, facts: Facts) -> str:
        """Why there is no entry: what is different in the most similar one."""
        path = self._path(facts)
        if path.is_file():
            return f"{path} is damaged or lacks files of {self.graphs}"
        entries = [e for e in map(self._read, sorted(self._programs.glob("*.json"))) if e]
        if not entries:
            return f"{self.directory} has no programs"
        nearest = min((self._differences(facts, e.facts) for e in entries), key=len)
        return "the nearest program there has " + "; ".join(nearest[:6])

    @staticmethod
    def _differences(wanted: Facts, had: Facts) -> list[str]:
        names = sorted({*wanted, *had})
        return [
            f"{name} {had.get(name, '-')!s:.80} instead of {wanted.get(name, '-')!s:.80}"
            for name in names
            if digest(wanted.get(name)) != digest(had.get(name))
        ]

    def _path(self, facts: Facts) -> Path:
        return self._programs / f"{digest(facts)}.json"

    @staticmethod
    def _read(path: Path) -> Entry | None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return Entry(facts=dict(data["facts"]), files=tuple(data["files"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent, or written by something else: as good as absent
