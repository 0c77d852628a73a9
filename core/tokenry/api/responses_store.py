"""Responses that are kept: in memory, bounded by number and bytes; the oldest go first.

In: finished responses, and those that run in the background. Out: a response by its id, the items
of a conversation, and the events of one that runs. Owned by the server; gone at its end.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokenry.api.caller import caller
from tokenry.errors import RequestError

MAX_BYTES = 256 * 2**20
"""Most JSON of all responses together."""
ENDED = ("completed", "incomplete", "failed", "cancelled")


@dataclass(slots=True, kw_only=True)
class Record:
    """One response. Its maker is the only writer.

    items    its input as items; earlier ones are found by `previous_response_id`.
    events   of a response that streams in the background; `news` is set at each.
    task     runs it in the background.
    owner    the mark of the key that made it: any other does not see it.
    """

    response: dict[str, Any]
    items: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    owner: str | None = None
    num_bytes: int = 0

    @property
    def ended(self) -> bool:
        """Whether it is as it will be."""
        return self.response["status"] in ENDED

    def tell(self, *events: dict[str, Any]) -> None:
        """Append events; who follows wakes up."""
        self.events += events
        news, self.news = self.news, asyncio.Event()
        news.set()

    async def follow(self, after: int) -> AsyncGenerator[dict[str, Any], None]:
        """Events after that sequence number, until the end."""
        at = 0
        while True:
            news = self.news
            for event in self.events[at:]:
                if event["sequence_number"] > after:
                    yield event
            at = len(self.events)
            if self.ended and at == len(self.events):
                return
            await news.wait()


class ResponseStore:
    """The records, least recently used first.

    most   of them; 0 keeps none but those that run.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: Record) -> None:
        """Keep it (again: its size has changed), and drop what is too old."""
        name = record.response["id"]
        self._num_bytes -= record.num_bytes if name in self._records else 0
        record.num_bytes = len(msgspec.json.encode((record.response, record.items, record.events)))
        self._num_bytes += record.num_bytes
        self._records[name] = record
        self._records.move_to_end(name)
        self._drop()

    def get(self, name: str) -> Record:
        """The record; raises RequestError (404) for one that is not here, or not the caller's."""
        record = self._seen(name)
        if record is None:
            error = RequestError(
                f"Response with id {name!r} not found: it was never stored, was deleted, or made "
                f"room for newer ones (the last {self._most} are kept in memory).",
                code="response_not_found",
            )
            error.status = 404
            raise error
        self._records.move_to_end(name)
        return record

    def delete(self, name: str) -> None:
        """Forget it; one that runs is ended."""
        record = self.get(name)
        del self._records[name]
        self._num_bytes -= record.num_bytes
        if record.task is not None:
            record.task.cancel()

    def conversation(self, name: str | None) -> list[dict[str, Any]]:
        """All items up to this response, its output included. Raises RequestError that names
        previous_response_id if one of them is gone or not finished.
        """
        parts: list[list[dict[str, Any]]] = []
        while name is not None:
            record = self._seen(name)
            if record is None or record.response["status"] not in ("completed", "incomplete"):
                why = "not found" if record is None else f"is {record.response['status']}"
                raise RequestError(
                    f"Previous response with id {name!r} {why}.",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            self._records.move_to_end(name)
            parts.append([*record.items, *record.response["output"]])
            name = record.response["previous_response_id"]
        return [item for part in reversed(parts) for item in part]

    def _seen(self, name: str) -> Record | None:
        """The record, if it is here and the request that is answered may know of it."""
        record = self._records.get(name)
        return record if record is not None and caller().sees(record.owner) else None

    def close(self) -> None:
        """End what runs."""
        for record in self._records.values():
            if record.task is not None:
                record.task.cancel()

    def _drop(self) -> None:
        for name, record in list(self._records.items()):
            if len(self._records) <= self._most and self._num_bytes <= MAX_BYTES:
                return
            if record.ended:
                del self._records[name]
                self._num_bytes -= record.num_bytes
