"""Batches: their state on disk, and one after the other their lines through the engine, behind live
requests.

In: a file of lines. Out: a file of answers and one of errors. What is on disk is the truth: each
answer is appended when it is there, so after a crash only what was under way is done again. A full
disk stops the batch, says so in it, and it goes on when there is room.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from tokenry.api.batch_lines import MAX_ERRORS, Line, Result, read_lines, run_lines
from tokenry.api.disk import StorageFull, append, cut_to_whole_lines, write_whole
from tokenry.api.files_store import FileStore, new_file_id
from tokenry.api.owned import OWNER, may_see
from tokenry.errors import RequestError

log = logging.getLogger("tokenry.api")
Batch = dict[str, Any]
ENDED = ("completed", "failed", "expired", "cancelled")
WINDOW_S = 24 * 3600
PATIENCE_S = 0.5
"""How long a batch waits before it looks again whether there is room."""


class Worker(Protocol):
    """Who answers lines."""

    async def answer(self, line: Line, owner: str | None) -> Result:
        """The answer to one, of a batch of this owner."""

    def has_room(self) -> bool:
        """Whether a line may start now, behind live requests."""


class BatchStore:
    """All batches. Owns their directory and is the only writer of their state."""

    def __init__(self, path: Path, files: FileStore, *, at_once: int) -> None:
        self._path = path
        self._files = files
        self._at_once = at_once
        self._batches: dict[str, Batch] = {}
        self._news = asyncio.Event()
        self._running: tuple[str, asyncio.Task[None]] | None = None
        for draft in path.glob("*.draft"):
            draft.unlink()
        for file in path.glob("*.json"):
            batch = msgspec.json.decode(file.read_bytes())
            self._batches[batch["id"]] = batch

    # ---- what clients ask ----------------------------------------------------------------------

    async def create(
        self,
        *,
        input_file_id: str,
        endpoint: str,
        metadata: dict[str, str] | None,
        owner: str | None,
    ) -> Batch:
        """A new batch; raises StorageFull, and then there is none."""
        now = int(time.time())
        batch: Batch = {
            "id": f"batch_{uuid.uuid4().hex}",
            "object": "batch",
            "endpoint": endpoint,
            "errors": None,
            "input_file_id": input_file_id,
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "in_progress_at": None,
            "expires_at": now + WINDOW_S,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
            "notice": None,
            OWNER: owner,
        }
        await asyncio.to_thread(write_whole, self._file(batch), msgspec.json.encode(batch))
        self._batches[batch["id"]] = batch
        self._news.set()
        return batch

    def get(self, name: str) -> Batch:
        """The batch; raises RequestError (404) for one that is not the caller's, too."""
        batch = self._batches.get(name)
        if batch is None or not may_see(batch):
            error = RequestError(f"No batch found with id {name!r}.", code="batch_not_found")
            error.status = 404
            raise error
        return batch

    def all(self) -> list[Batch]:
        """Oldest first."""
        return sorted(self._batches.values(), key=lambda b: (b["created_at"], b["id"]))

    async def cancel(self, name: str) -> Batch:
        """End it; what is done stays. Raises RequestError for one that has ended."""
        batch = self.get(name)
        if batch["status"] in (*ENDED, "finalizing"):
            raise RequestError(
                f"The batch is {batch['status']} and cannot be cancelled.", code="batch_ended"
            )
        if batch["status"] != "cancelling":
            changed = {**batch, "status": "cancelling", "cancelling_at": int(time.time())}
            await asyncio.to_thread(write_whole, self._file(batch), msgspec.json.encode(changed))
            batch.update(changed)
        if self._running is not None and self._running[0] == name:
            self._running[1].cancel()
        self._news.set()
        return batch

    def uses(self, file_id: str) -> bool:
        """Whether a batch that has not ended reads the file."""
        return any(b["input_file_id"] == file_id and b["status"] not in ENDED for b in self.all())

    # ---- the work ------------------------------------------------------------------------------

    async def run(self, worker: Worker) -> None:
        """Work until cancelled; sleeps while there is nothing to do."""
        while True:
            self._news.clear()
            waiting = [batch for batch in self.all() if batch["status"] not in ENDED]
            if not waiting:
                await self._news.wait()
                continue
            batch = waiting[0]
            task = asyncio.create_task(self._work(batch, worker))
            self._running = (batch["id"], task)
            try:
                await asyncio.wait([task])
            finally:
                self._running = None
                task.cancel()
            error = None if task.cancelled() else task.exception()
            if error is not None:  # its files are gone, or not what they were
                log.error("batch %s failed", batch["id"], exc_info=error)
                told = {"code": "server_error", "message": f"{type(error).__name__}: {error}"}
                errors = {"object": "list", "data": [{**told, "param": None, "line": None}]}
                await self._save(batch, status="failed", failed_at=int(time.time()), errors=errors)

    async def _work(self, batch: Batch, worker: Worker) -> None:
        """Bring one batch to its end, from wherever it is."""
        if batch["status"] == "validating":
            await self._validate(batch)
        if batch["status"] == "in_progress":
            await self._run_lines(batch, worker)
        if batch["status"] in ("finalizing", "cancelling"):
            await self._finish(batch)

    async def _validate(self, batch: Batch) -> None:
        path = self._files.path_of(batch["input_file_id"])
        total, wrong = await asyncio.to_thread(_check, path, batch["endpoint"])
        now = int(time.time())
        batch["request_counts"]["total"] = total
        if wrong:
            errors = {"object": "list", "data": wrong[:MAX_ERRORS]}
            await self._save(batch, status="failed", failed_at=now, errors=errors)
        else:
            await self._save(batch, status="in_progress", in_progress_at=now)

    async def _run_lines(self, batch: Batch, worker: Worker) -> None:
        path = self._files.path_of(batch["input_file_id"])
        skipped = await asyncio.to_thread(self._count, batch)
        counts = batch["request_counts"]

        def lines() -> Iterator[Line]:
            for line in read_lines(path, [batch["endpoint"]]):
                if isinstance(line, Line) and line.custom_id not in skipped:
                    yield line

        async def answer(line: Line) -> Result:
            if time.time() > batch["expires_at"]:
                told = {"code": "batch_expired", "message": "The batch's 24 hours were over."}
                return Result(custom_id=line.custom_id, status=0, body=told)
            return await worker.answer(line, batch.get(OWNER))

        async def may_start() -> None:
            while time.time() <= batch["expires_at"] and (
                batch["notice"] is not None or not worker.has_room()
            ):
                await asyncio.sleep(PATIENCE_S)

        async def write(result: Result) -> None:
            target = self._file(batch).with_suffix(".out" if result.ok else ".err")
            await self._persist(batch, lambda: _in_thread(append, target, result.encoded()))
            counts["completed" if result.ok else "failed"] += 1

        await run_lines(lines(), answer, write, may_start=may_start, at_once=self._at_once)
        outputs = {
            f"{kind}_file_id": new_file_id()
            for kind, suffix in (("output", ".out"), ("error", ".err"))
            if self._file(batch).with_suffix(suffix).exists()
        }
        await self._save(batch, status="finalizing", finalizing_at=int(time.time()), **outputs)

    async def _finish(self, batch: Batch) -> None:
        """The lines' files become files of clients. May be done again after a crash."""
        cancelled = batch["status"] == "cancelling"
        parts = (("output", ".out"), ("error", ".err"))
        if cancelled:  # its files have no ids yet
            await asyncio.to_thread(self._count, batch)
            missing = {
                f"{kind}_file_id": new_file_id()
                for kind, suffix in parts
                if batch[f"{kind}_file_id"] is None
                and self._file(batch).with_suffix(suffix).exists()
            }
            await self._save(batch, **missing)
        for kind, suffix in parts:
            name = batch[f"{kind}_file_id"]
            if name is None:
                continue
            source = self._file(batch).with_suffix(suffix)
            await asyncio.to_thread(cut_to_whole_lines, source)
            filename = f"{batch['id']}_{kind}.jsonl"

            adopt = functools.partial(
                self._files.adopt,
                name,
                source,
                filename=filename,
                purpose="batch_output",
                owner=batch.get(OWNER),
            )
            await self._persist(batch, functools.partial(asyncio.to_thread, adopt))
        now = int(time.time())
        expired = not cancelled and batch["finalizing_at"] > batch["expires_at"]
        status = "cancelled" if cancelled else "expired" if expired else "completed"
        await self._save(batch, status=status, **{f"{status}_at": now})

    def _count(self, batch: Batch) -> set[str]:
        """The custom_ids of lines that are done; sets the counts to what the files hold."""
        found: set[str] = set()
        for name, suffix in (("completed", ".out"), ("failed", ".err")):
            path = self._file(batch).with_suffix(suffix)
            cut_to_whole_lines(path)
            lines = path.read_bytes().splitlines() if path.exists() else []
            batch["request_counts"][name] = len(lines)
            found |= {msgspec.json.decode(line)["custom_id"] for line in lines}
        return found

    async def _save(self, batch: Batch, **changes: Any) -> None:
        """The batch with the changes, first on disk."""
        changed = {**batch, **changes, "notice": None}
        data = msgspec.json.encode(changed)
        await self._persist(batch, lambda: _in_thread(write_whole, self._file(batch), data))
        batch.update(changed)

    async def _persist(self, batch: Batch, write: Callable[[], Awaitable[None]]) -> None:
        """Write, and while the disk is full say so and try again: nothing is lost meanwhile."""
        while True:
            try:
                await write()
            except StorageFull as error:
                batch["notice"] = f"{error.message} The batch goes on when there is room."
                await asyncio.sleep(PATIENCE_S)
            else:
                batch["notice"] = None
                return

    def _file(self, batch: Batch) -> Path:
        return self._path / f"{batch['id']}.json"


async def _in_thread(write: Callable[[Path, bytes], None], path: Path, data: bytes) -> None:
    """Ends before a cancellation does: nobody reads a line that is half written."""
    writing = asyncio.ensure_future(asyncio.to_thread(write, path, data))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        raise


def _check(path: Path, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """How many lines there are, and which are wrong."""
    total = 0
    wrong: list[dict[str, Any]] = []
    for line in read_lines(path, [endpoint]):
        if isinstance(line, Line):
            total += 1
        elif len(wrong) < MAX_ERRORS:
            wrong.append(line)
    if not total and not wrong:
        told = {"code": "empty_file", "message": "The input file has no lines.", "param": None}
        wrong.append({**told, "line": None})
    return total, wrong
