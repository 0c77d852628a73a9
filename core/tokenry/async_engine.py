"""An engine process as an object of asyncio: prompts in, streams of `RequestOutput` out.

In: `EngineConfig`, prompts with SamplingParams. Out: outputs as they come; errors to whoever waits.
Owns an `EngineHandle` and an `OutputProcessor`. A process that ends answers every waiting request
with `EngineDead`. Never imports torch: all that computes is on the other side of the socket.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from tokenry.backend.discovery import check_installed
from tokenry.config import EngineConfig
from tokenry.engine_handle import EngineHandle
from tokenry.engine_process import DEFAULT_FACTORY
from tokenry.errors import EngineDead, RequestError, TokenryError
from tokenry.hub import find_model
from tokenry.messages import (
    Abort,
    Event,
    Progress,
    Query,
    Ready,
    Reply,
    Stats,
    TokensEvent,
)
from tokenry.outputs import RequestOutput
from tokenry.params import SamplingParams, default_params
from tokenry.pooling import PooledRequest, PoolingOutput, PoolingParams
from tokenry.text.outputs import OutputKind, OutputProcessor, Update
from tokenry.text.pooling import PooledInputs
from tokenry.text.tokenizer import Tokenizer
from tokenry.vectors import pooled_request


class AsyncEngine:
    """A model behind its own process. `await AsyncEngine.start(config)`, `shutdown` at the end.

    chat_template  file with a Jinja chat template, instead of the tokenizer's.
    factory        dotted name of what makes the engine in its process; tests bring their own.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        chat_template: str | None = None,
        factory: str = DEFAULT_FACTORY,
    ) -> None:
        self.config = config
        self.progress = Progress(phase="starting")
        self.latest_stats = Stats()
        self.dead: TokenryError | None = None
        self._chat_template = chat_template
        self._factory = factory
        self._ready: Ready | None = None
        self._tokenizer: Tokenizer | None = None
        self._processor: OutputProcessor | None = None
        self._handle = EngineHandle(self._take, self._die)
        self._queues: dict[str, tuple[asyncio.Queue[Update], int]] = {}
        self._num_completions = 0
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._next_query_id = 0
        self._started = asyncio.Event()
        self.ended = asyncio.Event()

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        chat_template: str | None = None,
        factory: str = DEFAULT_FACTORY,
    ) -> AsyncEngine:
        """An engine that serves; raises the error that its start failed with."""
        engine = cls(config, chat_template=chat_template, factory=factory)
        try:
            await engine.launch()
            await engine.wait_ready()
        except BaseException:
            await engine.shutdown()
            raise
        return engine

    async def launch(self) -> None:
        """Find the model, begin to load it in its process, read the tokenizer meanwhile."""
        check_installed(self.config.backend)
        self.progress = Progress(phase="finding the model")
        model = await asyncio.to_thread(find_model, self.config.model, self.config.revision)
        config = dataclasses.replace(self.config, model=str(model))
        self.progress = Progress(phase="starting the engine process")
        await self._handle.start(config, self._factory)
        try:
            source = model
            if config.tokenizer is not None:
                source = await asyncio.to_thread(find_model, config.tokenizer)
            self._tokenizer = await asyncio.to_thread(self._load_tokenizer, source, model)
        except TokenryError as error:
            self._die(error)
            raise
        self._begin()

    async def wait_ready(self) -> Ready:
        """What the engine said when it was loaded; raises the cause if it could not be."""
        await self._started.wait()
        if self.dead is not None:
            raise self.dead
        return self.ready

    @property
    def ready(self) -> Ready:
        """Facts about the loaded engine; raises EngineDead before it is loaded and after its
        end.
        """
        if self.dead is not None:
            raise self.dead
        if self._ready is None:
            raise EngineDead(f"The engine is still loading ({self.progress.phase}).", mend="wait")
        return self._ready

    @property
    def is_ready(self) -> bool:
        """Whether requests can be served now."""
        return self._ready is not None and self._processor is not None and self.dead is None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        if self._tokenizer is None:
            raise EngineDead("The tokenizer is not loaded yet.", mend="wait")
        return self._tokenizer

    @property
    def pid(self) -> int | None:
        """Process id of the engine."""
        return self._handle.pid

    @property
    def pulse(self) -> tuple[int, float]:
        """Heartbeats of the process so far, and how long its step was under way at the last one."""
        return self._handle.num_beats, self._handle.step_s

    @property
    def num_requests(self) -> int:
        """Requests that are not finished."""
        return len(self._queues)

    @property
    def num_completions(self) -> int:
        """Completions that these requests asked for."""
        return self._num_completions

    def check_health(self) -> None:
        """Raises EngineDead, with the cause, if the engine does not serve."""
        _ = self.ready

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        queue: asyncio.Queue[Update],
        *,
        prompt: str | None = None,
        kind: OutputKind = "cumulative",
        priority: int = 0,
        filler: bool = False,
        cache_salt: str = "",
        param: str = "prompt",
        pooling: PoolingParams | None = None,
    ) -> None:
        """Start a request now; its updates go to `queue`. Raises RequestError, and then nothing was
        started.
        """
        self.check_health()
        if self._processor is None:
            raise EngineDead("The engine is still loading.", mend="wait")
        commands = self._processor.add(
            request_id,
            prompt_ids,
            params,
            prompt=prompt,
            kind=kind,
            priority=priority,
            filler=filler,
            cache_salt=cache_salt,
            param=param,
            pooling=pooling,
        )
        self._queues[request_id] = (queue, params.n)
        self._num_completions += params.n
        try:
            self._handle.send(*commands)
        except (TypeError, ValueError, OverflowError) as error:  # msgpack cannot hold it
            self._forget(request_id)
            self._processor.abort(request_id)
            raise RequestError(f"The request cannot be sent to the engine: {error}.") from error

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        kind: OutputKind = "cumulative",
    ) -> AsyncIterator[RequestOutput]:
        """The request's outputs; closing or cancelling the iteration aborts it within a step."""
        name = request_id or uuid.uuid4().hex
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        queue: asyncio.Queue[Update] = asyncio.Queue()
        self.submit(
            name,
            ids,
            params or default_params(self.ready.sampling_defaults),
            queue,
            prompt=text,
            kind=kind,
            priority=priority,
            cache_salt=cache_salt,
        )
        try:
            while True:
                update = await queue.get()
                if update.error is not None:
                    raise update.error
                if update.output is not None:
                    yield update.output
                if update.finished:
                    return
        finally:
            self.abort(name)

    async def encode(
        self,
        prompt: str | Sequence[int],
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        truncate_prompt_tokens: int | None = None,
    ) -> PooledRequest[PoolingOutput]:
        """What the model computes of the text, an embedding or classes; cancelling aborts it."""
        name = request_id or uuid.uuid4().hex
        longest = self.ready.max_model_len
        inputs = PooledInputs(self.tokenizer, max_len=longest, truncate=truncate_prompt_tokens)
        one = inputs.one(prompt, "prompt")
        queue: asyncio.Queue[Update] = asyncio.Queue()
        self.submit(
            name,
            one.token_ids,
            SamplingParams(max_tokens=0),
            queue,
            prompt=one.text,
            kind="final",
            priority=priority,
            pooling=pooling_params or PoolingParams(),
        )
        try:
            update = await queue.get()
            if update.error is not None:
                raise update.error
            assert update.output is not None, "kind final: one update, the last"
            return pooled_request(update.output)
        finally:
            self.abort(name)

    def abort(self, request_id: str) -> None:
        """End the request; who waits for it gets an error. A finished one is left alone."""
        queue = self._forget(request_id)
        if queue is not None:
            error = RequestError("The request was aborted.", code="aborted")
            queue.put_nowait(Update(request_id=request_id, error=error))
        children = () if self._processor is None else self._processor.abort(request_id)
        if children and self.dead is None:
            self._handle.send(Abort(request_ids=children))

    async def stats(self) -> Stats:
        """The engine's counters and gauges now."""
        await self._query("stats")
        return self.latest_stats

    async def reset_prefix_cache(self) -> bool:
        """Forget every cached prompt beginning. True, as vLLM says it: running requests keep their
        blocks and never hinder it.
        """
        reply = await self._query("reset_prefix_cache")
        if reply.error is not None:
            raise TokenryError(reply.error)
        return True

    async def check_integrity(self) -> None:
        """The engine checks its books; raises TokenryError with both sides if they do not agree."""
        reply = await self._query("check_integrity")
        if reply.error is not None:
            raise TokenryError(reply.error)

    async def shutdown(self) -> None:
        """End the process and everything that waits for it; a second call does nothing."""
        self._die(EngineDead("The engine was shut down."))
        await self._handle.end()

    def _load_tokenizer(self, source: Path, model: Path) -> Tokenizer:
        return Tokenizer.load(source, model_path=model, chat_template_file=self._chat_template)

    def _begin(self) -> None:
        if self._processor is None and self._ready is not None and self._tokenizer is not None:
            self._tokenizer = self._tokenizer.within(self._ready.max_model_len)
            self._processor = OutputProcessor(
                self._tokenizer,
                max_model_len=self._ready.max_model_len,
                vocab_size=self._ready.vocab_size,
                limits=self._ready.limits,
            )
            self._started.set()

    def _take(self, event: Event) -> None:
        if isinstance(event, TokensEvent):
            self._take_tokens(event)
        elif isinstance(event, Stats):
            self.latest_stats = event
        elif isinstance(event, Reply):
            waiting = self._replies.pop(event.query_id, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(event)
        elif isinstance(event, Progress):
            self.progress = event
        elif isinstance(event, Ready):
            self._ready = event
            self.progress = Progress(phase="ready", share=1.0)
            self._begin()

    def _take_tokens(self, event: TokensEvent) -> None:
        update = None if self._processor is None else self._processor.update(event)
        if update is None:
            return
        if update.abort:
            self._handle.send(Abort(request_ids=update.abort))
        waiting = self._queues.get(update.request_id)
        if waiting is None:
            return
        waiting[0].put_nowait(update)
        if update.finished:
            self._forget(update.request_id)

    def _forget(self, request_id: str) -> asyncio.Queue[Update] | None:
        """Nobody waits for it any more; the queue of who did."""
        queue, num_completions = self._queues.pop(request_id, (None, 0))
        self._num_completions -= num_completions
        return queue

    def _die(self, error: TokenryError) -> None:
        if self.dead is None:
            self.dead = error
        self.latest_stats = msgspec.structs.replace(
            self.latest_stats, num_running=0, num_waiting=0, kv_usage=0.0
        )
        self._started.set()
        self.ended.set()
        updates = [] if self._processor is None else self._processor.fail_all(error)
        for update in updates:
            queue = self._forget(update.request_id)
            if queue is not None:
                queue.put_nowait(update)
        for waiting in self._replies.values():
            if not waiting.done():
                waiting.set_exception(error)
        self._replies.clear()

    async def _query(
        self, what: Literal["stats", "reset_prefix_cache", "check_integrity"]
    ) -> Reply:
        self.check_health()
        self._next_query_id += 1
        query = Query(query_id=self._next_query_id, what=what)
        waiting: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[query.query_id] = waiting
        self._handle.send(query)
        try:
            return await waiting
        finally:
            self._replies.pop(query.query_id, None)
