"""The shapes of a load, step by step: recorded by a runner, read by `tokenry buckets`.

In: the rows of a plan as shares. Out: a file of JSON lines, one per step:
`{"rows": [[start, count], ...], "scored": [row, ...]}`, where start is what was computed already,
count what this step computes, and scored the rows whose prompt log-probabilities are asked for. No
text, no token: a recorded load tells nothing about what was said. It is the same for all devices.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from tokenry.errors import ConfigError
from tokenry.runner.shapes import Share

Step = tuple[Share, ...]


class StepLog:
    """Appends steps to a file. Owned by ModelRunner."""

    def __init__(self, file: str) -> None:
        try:
            self._out: TextIO = Path(file).open(  # noqa: SIM115  # open as long as the runner lives
                "a", encoding="utf-8", buffering=1
            )
        except OSError as error:
            raise ConfigError(
                f"{file} cannot be written: {error.strerror}.", mend="--record-steps FILE"
            ) from error

    def note(self, shares: Sequence[Share]) -> None:
        """One step."""
        if shares:
            self._out.write(step_line(shares))


def step_line(shares: Sequence[Share]) -> str:
    """The step as a line of the file."""
    line: dict[str, object] = {"rows": [[s.start, s.count] for s in shares]}
    scored = [i for i, s in enumerate(shares) if s.scored]
    if scored:
        line["scored"] = scored
    return json.dumps(line, separators=(",", ":")) + "\n"


def read_steps(file: str) -> list[Step]:
    """The steps of a file. Raises ConfigError that names the line."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read: {error}.", mend="record one: tokenry serve --record-steps FILE"
        ) from error
    steps = [_step(line, f"{file}:{i + 1}") for i, line in enumerate(lines) if line.strip()]
    if not steps:
        raise ConfigError(f"{file} holds no step.", mend="tokenry serve --record-steps FILE")
    return steps


def _step(line: str, where: str) -> Step:
    try:
        data = json.loads(line)
        scored = set(data.get("scored", ()))
        return tuple(_shares(data["rows"], scored))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{where} is not a step: {line[:80]!r}.", mend='{"rows": [[start, count], ...]}'
        ) from error


def _shares(rows: list[list[int]], scored: set[int]) -> Iterator[Share]:
    for i, (start, count) in enumerate(rows):
        if type(start) is not int or type(count) is not int or start < 0 or count < 1:
            raise ValueError
        yield Share(row=i, start=start, count=count, sample=True, scored=i in scored)
