"""The files that a benchmark writes, opened before anything is measured.

In: the flags --json, --csv, --plot. Out: the files, filled at the end; what was in them stays until
then. A file that cannot be opened or written is one error that names its flag.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tokenry.bench.figures import Spread
from tokenry.errors import ConfigError, TokenryError

FLAGS = ("json", "csv", "plot")


class Outputs:
    """Files by flag; writing to one that was not asked for does nothing."""

    def __init__(self, files: Mapping[str, BinaryIO]) -> None:
        self._files = files

    @classmethod
    @contextmanager
    def open(cls, args: argparse.Namespace) -> Iterator[Outputs]:
        """Those that the flags name. Raises ConfigError."""
        with ExitStack() as stack:
            files: dict[str, BinaryIO] = {}
            for flag in FLAGS:
                path = getattr(args, flag, None)
                if path:
                    try:
                        files[flag] = stack.enter_context(Path(path).open("ab", buffering=0))
                    except OSError as error:
                        raise ConfigError(
                            f"--{flag} {path}: {error.strerror or error}.", mend=f"--{flag} FILE"
                        ) from error
            yield cls(files)

    def json(self, data: Mapping[str, object]) -> None:
        """Figures; a Spread becomes an object."""
        text = json.dumps(data, indent=1, default=_plain) + "\n"
        self._write("json", text.encode())

    def csv(self, rows: Iterable[Sequence[Any]]) -> None:
        """A table."""
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        self._write("csv", text.getvalue().encode())

    def plot(self, picture: bytes) -> None:
        """A picture."""
        self._write("plot", picture)

    def _write(self, flag: str, data: bytes) -> None:
        file = self._files.get(flag)
        if file is None:
            return
        try:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe has nothing to forget
                file.truncate(0)
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise TokenryError(
                f"--{flag} {file.name}: {error.strerror or error}.",
                mend=f"--{flag} with a file on a disk that has room",
            ) from error


def _plain(value: object) -> object:
    if isinstance(value, Spread):
        return {"mean": value.mean, "p50": value.p50, "p99": value.p99}
    raise TypeError(f"{type(value).__name__} is not JSON")
