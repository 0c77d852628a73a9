"""Files that clients upload and batches write: below the data directory, two files each.

In: bytes with a name, a purpose and an owner. Out: OpenAI's file objects with their owner's mark
(owned.py), and paths to read from. A file is there once its `.json` is; what a crash left of others
is removed at the start. Calls block: they are made in threads.
"""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec

from tokenry.api.disk import sync_directory, write_whole
from tokenry.api.owned import OWNER, may_see
from tokenry.errors import ConfigError, RequestError


class DataDir:
    """The data directory, held by one server at a time."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        try:
            for part in (self.files, self.batches):
                part.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(
                f"The data directory {path} cannot be used: {error.strerror}.",
                mend="--data-dir of a directory that may be written",
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(
                f"The data directory {path} is in use by another server.",
                mend="--data-dir of another directory",
            ) from error

    @property
    def files(self) -> Path:
        """Where files are."""
        return self.path / "files"

    @property
    def batches(self) -> Path:
        """Where batches are."""
        return self.path / "batches"


class FileStore:
    """All files. Owns the directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._objects: dict[str, dict[str, Any]] = {}
        for file in path.iterdir():
            if file.suffix != ".json" and not file.with_suffix(".json").exists():
                file.unlink()
            elif file.suffix == ".json":
                found = msgspec.json.decode(file.read_bytes())
                self._objects[found["id"]] = found

    def draft(self) -> tuple[str, Path]:
        """A new file's id, and the path to write its content to."""
        name = new_file_id()
        return name, self.path_of(name)

    def commit(
        self, name: str, *, filename: str, purpose: str, owner: str | None
    ) -> dict[str, Any]:
        """The content is written: the file object. On an error there is no file."""
        content = self.path_of(name)
        found = {
            "id": name,
            "object": "file",
            "bytes": content.stat().st_size,
            "created_at": int(time.time()),
            "expires_at": None,
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
            "status_details": None,
            OWNER: owner,
        }
        write_whole(content.with_suffix(".json"), msgspec.json.encode(found))
        self._objects[name] = found
        return found

    def adopt(
        self, name: str, source: Path, *, filename: str, purpose: str, owner: str | None
    ) -> None:
        """Make a file of one that lies elsewhere on this disk; a second call does nothing."""
        if source.exists():
            source.replace(self.path_of(name))
            sync_directory(self._path)
        if name not in self._objects:
            self.commit(name, filename=filename, purpose=purpose, owner=owner)

    def discard(self, name: str) -> None:
        """Remove the content of a draft."""
        self.path_of(name).unlink(missing_ok=True)

    def get(self, name: str) -> dict[str, Any]:
        """The file object; raises RequestError (404) for one that is not the caller's, too."""
        found = self._objects.get(name)
        if found is None or not may_see(found):
            error = RequestError(f"No such File object: {name}", param="id", code="file_not_found")
            error.status = 404
            raise error
        return found

    def delete(self, name: str) -> None:
        """Remove it; raises RequestError (404)."""
        self.get(name)
        self.path_of(name).with_suffix(".json").unlink(missing_ok=True)
        self.discard(name)
        del self._objects[name]

    def all(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return sorted(self._objects.values(), key=lambda f: (f["created_at"], f["id"]))

    def path_of(self, name: str) -> Path:
        """Where the content is; `name` is an id that we made."""
        return self._path / f"{name}.bin"


def new_file_id() -> str:
    """`file-…`."""
    return f"file-{uuid.uuid4().hex}"
