"""Bytes that must survive: written whole or not at all; a full disk is an error that loses
nothing.

In: paths and bytes. Out: files. Raises `StorageFull`, and then what was there before is still
there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from tokenry.errors import TokenryError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_APPENDING = threading.Lock()


class StorageFull(TokenryError):
    """The disk has no room for what should be kept."""

    status = 507
    code = "disk_full"


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Around writing: an OSError that means "no room" becomes StorageFull; it names the place."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise StorageFull(
            f"{path.parent} has no room: {error.strerror}. Nothing that was there is lost.",
            mend="delete files there, or give it more room; then send the request again",
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Replace the file's content at once: a reader, also after a crash, sees the old or the new."""
    draft = path.with_name(f"{path.name}.draft")
    try:
        with room_for(path), draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    draft.replace(path)
    sync_directory(path.parent)


def append(path: Path, data: bytes) -> None:
    """Add the bytes at the end, all of them or none; threads may add to one file."""
    # who takes back a half must not take back what others wrote behind it
    with _APPENDING, room_for(path), path.open("ab", buffering=0) as file:
        length = file.tell()
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(length)
            raise


def sync_directory(path: Path) -> None:
    """A rename in the directory survives a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def cut_to_whole_lines(path: Path) -> None:
    """Drop what a crash left of a last line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
