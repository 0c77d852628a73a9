"""Who may ask, and how much: keys by their hash, from the command line or from a file.

In: `--api-key` texts, a file of hashed keys that may change while the server runs. Out: the `Key`
that a client's text belongs to. A key's text is never stored: a file holds its SHA-256, which is
enough for a text of 256 random bits. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tokenry.errors import ConfigError

log = logging.getLogger("tokenry.keys")
PREFIX = "tk-"
LOOK_S = 1.0
"""A changed file is seen after so long at most."""


class Targets(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an answer's time is held against, in milliseconds; None: nothing is asked.

    ttft_ms      until the first token, from arrival.
    tpot_ms      per token after the first, on average.
    deadline_ms  until the whole answer, from arrival.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    deadline_ms: float | None = None


class Key(Targets, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One client. Limits that are None do not bind.

    name                 what the log and the metrics call it.
    sha256               hex digest of the key's text.
    admin                may load, unload, sleep and wake models.
    priority             is added to what its requests ask for, which may then only lower it (lower
                         runs first); needs --scheduling-policy priority or slo.
    requests_per_minute  refilled evenly; a full minute's worth may come at once.
    tokens_per_minute    prompt and answer together, likewise.
    max_concurrent       requests that may be under way at once.
    """

    name: str
    sha256: str
    admin: bool = False
    priority: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not all(c in "0123456789abcdef" for c in self.sha256):
            raise ValueError(f"key {self.name!r}: sha256 must be 64 hex digits")
        for limit in (
            *("requests_per_minute", "tokens_per_minute", "max_concurrent"),
            *("ttft_ms", "tpot_ms", "deadline_ms"),
        ):
            value = getattr(self, limit)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"key {self.name!r}: {limit} must be above 0, not {value}")


class KeyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the file holds."""

    keys: tuple[Key, ...] = ()

    def __post_init__(self) -> None:
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in self.keys]
            twice = {value for value in values if values.count(value) > 1}
            if twice:
                raise ValueError(f"two keys have the {field} {min(twice)!r}")


def digest(text: str) -> str:
    """SHA-256 of a key's text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def new_text() -> str:
    """A new key: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def read_keys(path: Path) -> KeyFile:
    """The file's keys; raises ConfigError that says what is wrong with it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=KeyFile)
    except FileNotFoundError:
        raise ConfigError(
            f"There is no key file {path}.", mend=f"tokenry keys add NAME --file {path}"
        ) from None
    except OSError as error:
        raise ConfigError(f"The key file {path} cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The key file {path} is wrong: {error}.", mend="see `tokenry keys add --help`"
        ) from error


def write_keys(path: Path, keys: KeyFile) -> None:
    """Replace the file at once, readable by its owner alone."""
    text = msgspec.json.format(msgspec.json.encode(keys), indent=2) + b"\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


class KeyRing:
    """All keys of a server. Owns its copy of the file, and reads it anew when it has changed.

    A file that went wrong while the server runs changes nothing: the keys stay as they were, and
    the log says so once.

    texts, admin_texts   keys in plain text, and those that may manage models.
    priorities           whether the engine's queue knows priorities, so that a key may have one.
    """

    def __init__(
        self,
        texts: Sequence[str] = (),
        file: str | None = None,
        *,
        admin_texts: Sequence[str] = (),
        priorities: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed = (
            *(Key(name=f"api-key-{i}", sha256=digest(t)) for i, t in enumerate(texts)),
            *(
                Key(name=f"admin-key-{i}", sha256=digest(t), admin=True)
                for i, t in enumerate(admin_texts)
            ),
        )
        self._asked_for = bool(texts) or file is not None
        self._priorities = priorities
        self._path = None if file is None else Path(file)
        self._clock = clock
        self._looked_s = clock()
        self._stamp = self._stamp_now()
        self._keys = self._fixed if self._path is None else self._with(read_keys(self._path))

    @property
    def asked_for(self) -> bool:
        """Whether requests must bring a key. A file without keys lets nobody in."""
        return self._asked_for

    @property
    def keys(self) -> tuple[Key, ...]:
        """As they are now."""
        self._look()
        return self._keys

    def find(self, text: str) -> Key | None:
        """The key of this text. Every key is compared, each in constant time."""
        given = digest(text).encode()
        found = None
        for key in self.keys:
            if hmac.compare_digest(given, key.sha256.encode()):
                found = key
        return found

    def _look(self) -> None:
        now = self._clock()
        if self._path is None or now - self._looked_s < LOOK_S:
            return
        self._looked_s = now
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = self._with(read_keys(self._path))
        except ConfigError as error:
            log.error("%s The keys stay as they were.", error.message)
        else:
            log.info("%s was read anew: %d keys", self._path, len(self._keys))

    def _with(self, file: KeyFile) -> tuple[Key, ...]:
        for key in file.keys:
            if key.priority is not None and not self._priorities:
                raise ConfigError(
                    f"The key {key.name!r} has a priority, but requests are served in the order of "
                    "their arrival.",
                    mend="--scheduling-policy priority",
                )
        return (*self._fixed, *file.keys)

    def _stamp_now(self) -> tuple[int, int, int] | None:
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
