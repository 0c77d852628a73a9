"""Which programs were compiled before, and on what each depends.

In: facts about a program (model, bucket, versions, ...). Out: whether an entry has exactly these
facts and its files are still there, or how the nearest entry differs. The compiler keeps what it
makes in `graphs`; `programs/` has a JSON file per program: its facts, and the names of the
compiler's files that appeared while it was made. Knows no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Facts = Mapping[str, Any]
"""JSON values by name; equal facts mean that the same program would be made."""


def digest(value: Any) -> str:
    """A short name for a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class ProgramCache:
    """A directory that several processes may share: entries are whole or absent."""

    def __init__(self, directory: Path, graphs: Path) -> None:
        self.graphs = graphs
        self._programs = directory / "programs"

    def files(self) -> frozenset[str]:
        """All of the compiler's files."""
        return frozenset(
            str(f.relative_to(self.graphs)) for f in self.graphs.rglob("*") if f.is_file()
        )

    def has(self, facts: Facts) -> bool:
        """Whether the program with these facts is there, with all of its files."""
        entry = _read(self._path(facts))
        if entry is None or digest(entry["facts"]) != digest(facts):
            return False
        return all((self.graphs / name).is_file() for name in entry["files"])

    def store(self, facts: Facts, files: Iterable[str]) -> None:
        """Remember the program; its entry appears at once, with its whole content."""
        path = self._path(facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        text = json.dumps({"facts": facts, "files": sorted(files)}, indent=1, default=str)
        part.write_text(text, encoding="utf-8")
        part.replace(path)

    def explain_miss(self, facts: Facts) -> str:
        """What is different in the most similar program."""
        path = self._path(facts)
        if path.is_file():
            return f"{path} is damaged, or files of {self.graphs} are gone"
        entries = [entry for p in sorted(self._programs.glob("*.json")) if (entry := _read(p))]
        if not entries:
            return f"{self._programs} is empty"
        nearest = min((_differences(facts, entry["facts"]) for entry in entries), key=len)
        return f"the nearest program has {'; '.join(nearest)}"

    def _path(self, facts: Facts) -> Path:
        return self._programs / f"{digest(facts)}.json"


def _differences(wanted: Facts, had: Facts) -> list[str]:
    return [
        f"{name} {had.get(name, '-')!s:.80} instead of {wanted.get(name, '-')!s:.80}"
        for name in sorted({*wanted, *had})
        if digest(wanted.get(name)) != digest(had.get(name))
    ]


def _read(path: Path) -> dict[str, Any] | None:
    """An entry; None if the file is absent or written by something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {"facts": dict(data["facts"]), "files": list(data["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
