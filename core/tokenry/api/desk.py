"""What clients leave with the server: responses in memory, files and batches on disk.

In: the server's config. Out: the stores, and a task that works on batches. Owned by the server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.types import ASGIApp

from tokenry.api.batch_runner import BatchStore
from tokenry.api.batches_api import Filler
from tokenry.api.files_store import DataDir, FileStore
from tokenry.api.fleet import Fleet
from tokenry.api.responses_store import ResponseStore
from tokenry.api.router import Router
from tokenry.config import ServerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """The stores; files and batches only with a data directory."""

    responses: ResponseStore
    files: FileStore | None
    batches: BatchStore | None

    @classmethod
    def open(cls, config: ServerConfig) -> Desk:
        """Raises ConfigError if the data directory cannot be used."""
        responses = ResponseStore(config.max_stored_responses)
        if config.data_dir is None:
            return cls(responses=responses, files=None, batches=None)
        data = DataDir(config.data_dir)
        files = FileStore(data.files)
        batches = BatchStore(data.batches, files, at_once=config.batch_concurrency)
        return cls(responses=responses, files=files, batches=batches)

    @contextlib.asynccontextmanager
    async def at_work(self, app: ASGIApp, fleet: Fleet) -> AsyncIterator[None]:
        """While inside, batches run; `app` is the routes without the gate before them."""
        if self.batches is None:
            yield
            return
        task = asyncio.create_task(self.batches.run(Filler(Router(app, fleet=fleet), fleet)))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
