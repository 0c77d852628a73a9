"""What chat and completions share: answering at once or as a stream, and usage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tokenry.api.run import Run, until_disconnect
from tokenry.api.service import Service
from tokenry.api.sse import EventStream
from tokenry.api.wire import JSON, clamp
from tokenry.outputs import Logprob, RequestOutput

CLIENT_CLOSED = 499
"""What nginx logs for it; nobody is there to read it."""


class Usage(msgspec.Struct):
    """Token counts of an answer; the prompt counts once, whatever n is."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class RunningUsage:
    """Usage of a stream while it runs; an output tells its prompt again and again."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._completion = 0
        self.reasoning = 0

    def take(self, prompt_index: int, output: RequestOutput) -> None:
        """Count a delta."""
        self._prompts[prompt_index] = (len(output.prompt_token_ids), output.num_cached_tokens)
        self._completion += sum(len(one.token_ids) for one in output.outputs)

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        prompt, cached = (sum(p[i] for p in self._prompts.values()) for i in (0, 1))
        return Usage(
            prompt=prompt,
            completion=self._completion,
            cached=cached,
            reasoning=self.reasoning,
        ).as_json()


def usage_of(outputs: Sequence[RequestOutput], *, reasoning: int = 0) -> dict[str, Any]:
    """Usage of finished outputs; `reasoning` of their tokens are thinking."""
    return Usage(
        prompt=sum(len(output.prompt_token_ids) for output in outputs),
        completion=sum(len(one.token_ids) for output in outputs for one in output.outputs),
        cached=sum(output.num_cached_tokens for output in outputs),
        reasoning=reasoning,
    ).as_json()


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """Names of the fields that meant nothing."""
    text = ",".join(names).encode("ascii", "replace").decode()
    return {"x-ignored-params": "".join(c for c in text if c.isprintable())} if names else {}


async def answer_whole(
    request: Request,
    service: Service,
    run: Run,
    make: Callable[[list[RequestOutput]], Any],
    headers: dict[str, str],
) -> Response:
    """One JSON answer; a client that goes meanwhile aborts the run."""
    with service.active(), run:
        working = asyncio.ensure_future(_whole(run.outputs(), make))
        leaving = asyncio.ensure_future(until_disconnect(request))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                return Response(status_code=CLIENT_CLOSED)
            return JSON(working.result(), headers=headers)
        finally:
            working.cancel()
            leaving.cancel()


async def _whole(
    outputs: Awaitable[list[RequestOutput]], make: Callable[[list[RequestOutput]], Any]
) -> Any:
    return make(await outputs)


def answer_stream(
    service: Service, run: Run, events: AsyncGenerator[Any, None], headers: dict[str, str]
) -> Response:
    """A stream of events; its end, whatever it is, ends the run."""
    active = service.active()
    active.__enter__()  # a generator around the events would cost each token its way through it
    left = False

    def at_end() -> None:
        nonlocal left
        run.close()
        if not left:
            left = True
            active.__exit__(None, None, None)

    return EventStream(events, headers, at_end=at_end)


def prompt_logprobs(output: RequestOutput) -> list[Any] | None:
    """VLLM's prompt_logprobs: per prompt token, alternatives by id."""
    if output.prompt_logprobs is None:
        return None
    return [None if e is None else _by_id(e) for e in output.prompt_logprobs]


def _by_id(entry: dict[int, Logprob]) -> dict[str, Any]:
    return {
        str(token_id): {
            "logprob": clamp(lp.logprob),
            "rank": lp.rank,
            "decoded_token": lp.decoded_token,
        }
        for token_id, lp in entry.items()
    }
