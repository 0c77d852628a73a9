"""How the server's log looks: lines of text, or one JSON object per line for a log store.

In: level and format. Out: everything that the package logs, on stderr. Neither form holds a prompt
unless --log-prompts put it there (request_log.py).
"""

from __future__ import annotations

import io
import logging
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

LogFormat = Literal["text", "json"]
_server = logging.getLogger("tokenry.server")


class JSONLines(logging.Formatter):
    """`{"time", "level", "logger", "message"}`, or the fields of a record that has its own."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        line |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info and record.exc_info[1] is not None:
            line["trace"] = "".join(traceback.format_exception(record.exc_info[1]))
        return msgspec.json.encode(line).decode()


def set_up_logging(level: str, form: LogFormat = "text") -> None:
    """Everything of ours at this level or above goes to stderr, with time and origin; uvicorn's own
    warnings, too, where the lines are JSON.
    """
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(
        JSONLines()
        if form == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    )
    for name in ("tokenry", *(("uvicorn",) if form == "json" else ())):
        logger = logging.getLogger(name)
        logger.handlers = [stream]
        logger.propagate = False
    logging.getLogger("tokenry").setLevel(level.upper())


def sayer(form: LogFormat) -> Callable[[str], None]:
    """What tells the operator of the server's life: plain lines, or lines of the JSON log."""

    def say(line: str) -> None:
        if form == "json":
            _server.info(line)
        else:
            print(line, file=sys.stderr, flush=True)

    return say


class LogStream(io.StringIO):
    """A stream whose lines become lines of the log, for what prints its progress."""

    def write(self, text: str) -> int:
        """One print's text."""
        if text.strip():
            _server.info(text.strip())
        return len(text)
