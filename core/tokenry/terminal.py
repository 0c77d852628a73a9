"""Generating and chatting on a terminal: with an engine started here, or with a server.

In: configs, prompts, what a person types. Out: text on stdout as it comes; everything else, the
words of a chat among it, on stderr. Nothing is printed of prompts that cannot be served. The chat
with a server needs no torch.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from tokenry.config import EngineConfig
from tokenry.errors import TokenryError

if TYPE_CHECKING:
    from tokenry.async_engine import AsyncEngine
    from tokenry.params import SamplingParams

Message = dict[str, str]
MAX_TOKENS = 128
"""Of `generate` where nobody says how long an answer may be."""
WORDS = "/quit or Ctrl-D leaves, /new forgets the conversation, /help says this"


async def generate(
    config: EngineConfig, prompts: Sequence[str], sampling: Mapping[str, Any], *, quiet: bool
) -> None:
    """Continue the prompts one after the other. Raises RequestError if an answer that was asked for
    does not fit, before anything is printed.
    """
    engine = await _start(config, quiet=quiet)
    try:
        params = _params(engine, sampling)
        encoded = [engine.tokenizer.encode(prompt) for prompt in prompts]
        for ids in encoded:
            _check_length(engine, ids, params)
        if params.max_tokens is None:
            params = msgspec.structs.replace(params, max_tokens=MAX_TOKENS)
        for prompt, ids in zip(prompts, encoded, strict=True):
            begun = False
            async for text in _deltas(engine, ids, params):
                print(text if begun else prompt + text, end="", flush=True)
                begun = True
            print(flush=True)
    finally:
        await engine.shutdown()


async def chat_here(
    config: EngineConfig, opening: Sequence[Message], sampling: Mapping[str, Any], *, quiet: bool
) -> None:
    """Talk with a model started here, until the person leaves."""
    engine = await _start(config, quiet=quiet)
    try:
        messages = list(opening)
        params = _params(engine, sampling)
        _greet()
        while await asyncio.to_thread(_ask, messages, opening):
            text = engine.tokenizer.chat_template.render(messages)
            ids, answer = engine.tokenizer.encode(text, add_special_tokens=False), ""
            _check_length(engine, ids, params)
            async for delta in _deltas(engine, ids, params):
                answer += delta
                print(delta, end="", flush=True)
            print(flush=True)
            messages.append({"role": "assistant", "content": answer})
    finally:
        await engine.shutdown()


def chat_with_server(
    url: str, api_key: str, opening: Sequence[Message], wanted: Mapping[str, Any]
) -> None:
    """A client of any server with OpenAI's API; `wanted` are fields of each request."""
    messages = list(opening)
    _greet()
    while _ask(messages, opening):
        answer = ""
        for delta in _post_chat(url, api_key, {**wanted, "messages": messages, "stream": True}):
            answer += delta
            print(delta, end="", flush=True)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})


def _post_chat(url: str, api_key: str, body: Mapping[str, Any]) -> Iterator[str]:
    import httpx2

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    where = url.rstrip("/") + "/v1/chat/completions"
    try:
        with httpx2.stream("POST", where, json=body, headers=headers, timeout=600) as response:
            if response.status_code != 200:
                key = response.status_code in (401, 403)
                mend = "--api-key KEY, as the server was started with" if key else None
                raise TokenryError(_error_text(response.read()), mend=mend or f"see {url}/readyz")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise TokenryError(chunk["error"]["message"])
                if chunk["choices"]:
                    yield chunk["choices"][0]["delta"].get("content") or ""
    except httpx2.TransportError as error:
        raise TokenryError(
            f"No server answers at {url}: {error}.",
            mend="tokenry serve demo, or --url URL, or `tokenry chat demo` without a server",
        ) from error


def _error_text(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500] or "The server gave no answer."


def _greet() -> None:
    if sys.stdin.isatty():
        print(WORDS, file=sys.stderr, flush=True)


def _ask(messages: list[Message], opening: Sequence[Message]) -> bool:
    """Put what the person says next at the end of `messages`; False if that was goodbye. No prompt
    where nobody types.
    """
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return False
        word = line.strip()
        if word == "/quit":
            return False
        if word == "/help":
            print(WORDS, file=sys.stderr, flush=True)
        elif word == "/new":
            messages[:] = opening
        elif word:
            messages.append({"role": "user", "content": line})
            return True


async def _start(config: EngineConfig, *, quiet: bool) -> AsyncEngine:
    from tokenry.async_engine import AsyncEngine
    from tokenry.startup import StartLog, describe, follow

    log, engine = StartLog(shown=not quiet), AsyncEngine(config)

    async def launch() -> None:
        await engine.launch()
        await engine.wait_ready()

    task = asyncio.create_task(launch())
    try:
        await follow(log, lambda: engine.progress, task)
        await task
    except BaseException:
        await engine.shutdown()
        raise
    log.say(*describe(engine.ready))
    return engine


def _params(engine: AsyncEngine, sampling: Mapping[str, Any]) -> SamplingParams:
    """What was given, and the model's own defaults; without a length as long as there is room."""
    from tokenry.params import default_params

    return default_params(engine.ready.sampling_defaults, **{"max_tokens": None, **sampling})


def _check_length(engine: AsyncEngine, ids: Sequence[int], params: SamplingParams) -> None:
    """As a server does: an answer that was asked for must fit."""
    from tokenry.text.admission import check_answer_length

    check_answer_length(len(ids), params.max_tokens, engine.ready.max_model_len, param="prompt")


async def _deltas(
    engine: AsyncEngine, ids: Sequence[int], params: SamplingParams
) -> AsyncIterator[str]:
    async for output in engine.generate(ids, params, kind="delta"):
        for one in output.outputs:
            yield one.text
