"""One HTTP request's run through the engine: its prompts in, updates out, and an end in every case.

In: encoded prompts. Out: updates in the order in which they happen, and a pause now and then, so
that a stream can show that it lives. Leaving the run aborts what is not finished: an error, a
client that went, a shutdown.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from starlette.requests import Request

from tokenry.api.caller import caller
from tokenry.api.request_log import Account
from tokenry.api.service import Service
from tokenry.errors import RequestError, StepFailed
from tokenry.outputs import RequestOutput
from tokenry.params import SamplingParams
from tokenry.pooling import PoolingParams
from tokenry.text.admission import check_answer_length
from tokenry.text.outputs import OutputKind, Update

_SILENCE = Update(request_id="")
"""What the queue gets where nothing came for a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt: its tokens, its text if it came as text, the request's field that it is, and
    what vector it ends with (None: it is answered with tokens).
    """

    token_ids: Sequence[int]
    text: str | None
    param: str
    pooling: PoolingParams | None = None


class Run:
    """The requests of one HTTP request. Use it as a context manager."""

    def __init__(self, service: Service, request_id: str) -> None:
        self._service = service
        self._engine = service.engine  # the service may get another one, this run does not
        self._caller = caller()
        self._arrival_s = time.monotonic()
        self._request_id = request_id
        self._queue: asyncio.Queue[Update] = asyncio.Queue()
        self._ids: dict[str, int] = {}
        self._accounts: dict[str, Account] = {}
        self._heard_s = self._arrival_s
        self._timer: asyncio.TimerHandle | None = None
        self._last_s: dict[tuple[int, int], float] = {}

    def submit(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        kind: OutputKind,
        priority: int,
        cache_salt: str,
        asked_tokens: int | None,
    ) -> None:
        """Start all prompts or, if one is refused, none.

        asked_tokens  the answer's length if the request names one: then it must fit, while a length
                      that we chose is cut to what is left.
        """
        engine = self._engine
        priority = self._caller.priority(priority)
        params = self._caller.with_targets(params)
        most = engine.ready.max_model_len
        for prompt in prompts:
            check_answer_length(len(prompt.token_ids), asked_tokens, most, param=prompt.param)
        self._service.check_room(
            len(prompts) * params.n, param="n" if params.n > 1 else prompts[0].param
        )
        num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        account = self._caller.account
        if account is not None:
            account.take_prompt(num_tokens)
        try:
            for i, prompt in enumerate(prompts):
                name = f"{self._request_id}-{i}"
                engine.submit(
                    name,
                    prompt.token_ids,
                    params,
                    self._queue,
                    prompt=prompt.text,
                    kind=kind,
                    priority=priority,
                    filler=self._caller.filler,
                    cache_salt=cache_salt,
                    param=prompt.param,
                    pooling=prompt.pooling,
                )
                self._ids[name] = i
                self._accounts[name] = self._account(name, prompt, params)
        except RequestError:
            self.close()
            if account is not None:
                account.give_back(num_tokens)
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def accepted(self) -> None:
        """Until the engine has told of what takes it time to check, a grammar: raises what it
        refuses, so that a stream's status line can say so.
        """
        first = await self._queue.get()
        assert first.output is None, "a request is told that it was let in before its first token"
        if first.error is not None:
            try:
                self._take(first)
            finally:
                self.close()

    def close(self) -> None:
        """Abort what is not finished."""
        for name in self._ids:
            self._engine.abort(name)
            self._end(name, "abort")
        self._ids.clear()

    async def updates(self) -> AsyncIterator[tuple[int, RequestOutput] | None]:
        """(prompt's index, output) until all are finished; None after `keep_alive_s` of silence."""
        self._listen()
        try:
            while self._ids:
                update = await self._queue.get()
                if update is _SILENCE:
                    yield None
                elif update.request_id in self._ids:
                    index, output = self._take(update)
                    if output is not None:
                        yield index, output
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _take(self, update: Update) -> tuple[int, RequestOutput | None]:
        """Count it; raises the error that ended its request."""
        name = update.request_id
        index, output = self._ids[name], update.output
        if update.error is not None:
            del self._ids[name]
            self._end(name, "error")
            raise update.error
        if output is not None:
            self._accounts[name].take(output)
            self._count(index, output)
            if output.finished:
                del self._ids[name]
                self._end(name)
        return index, output

    def _listen(self) -> None:
        """Wake up when it was silent for `keep_alive_s`: one timer per run, none per token."""
        silent_s = time.monotonic() - self._heard_s
        left_s = self._service.config.keep_alive_s - silent_s
        if left_s <= 0:
            self._queue.put_nowait(_SILENCE)
            self._heard_s = time.monotonic()
            left_s = self._service.config.keep_alive_s
        self._timer = asyncio.get_running_loop().call_later(left_s, self._listen)

    async def outputs(self) -> list[RequestOutput]:
        """The finished outputs in the order of the prompts (kind "final")."""
        done: dict[int, RequestOutput] = {}
        async for item in self.updates():
            if item is not None:
                done[item[0]] = item[1]
        return [done[i] for i in sorted(done)]

    def _account(self, name: str, prompt: Prompt, params: SamplingParams) -> Account:
        told: str | Sequence[int] | None = None
        if self._service.config.log_prompts:
            told = prompt.token_ids if prompt.text is None else prompt.text
        return Account(
            name,
            len(prompt.token_ids),
            model=self._service.metrics.model,
            caller=self._caller,
            params=params,
            arrival_s=self._arrival_s,
            prompt=told,
        )

    def _end(self, name: str, reason: str | None = None) -> None:
        """The prompt has ended, by itself or by `reason`."""
        facts = self._accounts.pop(name).close(reason)
        self._service.metrics.ended(facts)
        self._service.tracer.ended(facts)

    def _count(self, index: int, output: RequestOutput) -> None:
        now = self._heard_s = time.monotonic()
        metrics = self._service.metrics
        for one in output.outputs:
            num_new = len(one.token_ids)
            key = (index, one.index)
            last_s = self._last_s.get(key)
            self._last_s[key] = now
            if num_new and self._caller.account is not None:
                self._caller.account.take_answer(num_new)
            if last_s is not None:
                if num_new:
                    metrics.token_gap(now - last_s, num_new)
            elif output.metrics is not None and output.metrics.first_token_s is not None:
                metrics.first_token(output.metrics.first_token_s - self._arrival_s)
            if one.finish_reason not in (None, "stop", "length"):
                raise StepFailed(f"The engine ended this request ({one.finish_reason}).")


async def until_disconnect(request: Request) -> None:
    """Returns when the client is gone (its body has been read)."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
