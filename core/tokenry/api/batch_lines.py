"""A batch's lines: what a line must be, the answer to one, and what is written of it.

In: JSONL of requests to our own routes. Out: OpenAI's result lines. The routes answer as they
answer a client; what would be a busy or loading server to a client is waited for here.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message

from tokenry.api.dialects import error_object
from tokenry.errors import RequestError

MAX_ERRORS = 100
"""Wrong lines that are told of; the batch has failed with the first."""
RETRY_S = 1.0
_BUSY = (429, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One request of a batch; `number` counts from 1."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a line; status is 0 where it was not run, and body says why then."""

    custom_id: str
    status: int
    body: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether it was answered."""
        return self.status == 200

    def encoded(self) -> bytes:
        """The line of the output or error file."""
        name = uuid.uuid4().hex
        response = None
        if self.status:
            response = {
                "status_code": self.status,
                "request_id": f"req_{name}",
                "body": self.body,
            }
        line = {
            "id": f"batch_req_{name}",
            "custom_id": self.custom_id,
            "response": response,
            "error": None if self.status else self.body,
        }
        return msgspec.json.encode(line) + b"\n"


def read_lines(path: Path, urls: Sequence[str]) -> Iterator[Line | dict[str, Any]]:
    """Each line, or what is wrong with it as OpenAI's batch error; `urls` may be asked."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                line = _line(number, raw, urls)
                if line.custom_id in seen:
                    text = f"The custom_id {line.custom_id!r} is used twice."
                    raise RequestError(text, param="custom_id", code="duplicate_custom_id")
            except RequestError as error:
                code = error.code or "invalid_json_line"
                told = {"code": code, "message": error.message, "param": error.param}
                yield {**told, "line": number}
                continue
            seen.add(line.custom_id)
            yield line


def _line(number: int, raw: bytes, urls: Sequence[str]) -> Line:
    try:
        data = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"Line {number} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise RequestError(f"Line {number} is no JSON object.")
    custom_id, body = data.get("custom_id"), data.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError(f"Line {number}: custom_id must be a text.", param="custom_id")
    if data.get("method", "POST") != "POST":
        raise RequestError(f"Line {number}: method must be POST.", param="method")
    url = data.get("url")
    if not isinstance(url, str) or url not in urls:
        text = f"Line {number}: url is {url!r}, it must be {' or '.join(urls)}."
        raise RequestError(text, param="url", code="mismatched_endpoint")
    if not isinstance(body, dict):
        raise RequestError(f"Line {number}: body must be an object.", param="body")
    return Line(number=number, custom_id=custom_id, url=url, body=body)


async def answer_line(app: ASGIApp, line: Line, *, model: str | None = None) -> Result:
    """The route's answer; `model` is for lines that name none."""
    body = dict(line.body)
    if body.get("stream"):
        error = RequestError("A line of a batch cannot stream.", param="stream")
        return Result(custom_id=line.custom_id, status=400, body=error_object(error))
    if model is not None and body.get("model") is None:
        body["model"] = model
    data = msgspec.json.encode(body)
    while True:
        status, answer = await _ask(app, line.url, data)
        if status not in _BUSY:
            return Result(custom_id=line.custom_id, status=status, body=answer)
        await asyncio.sleep(RETRY_S)


async def _ask(app: ASGIApp, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON of our own route, for a request that no client sent and no client leaves."""
    sent, status, answer = False, 0, bytearray()

    async def receive() -> Message:
        nonlocal sent
        if sent:
            never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
            return await never
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, answer
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            answer += message.get("body", b"")

    scope = {
        "type": "http",
        "http_version": "1.1",
        "scheme": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
    }
    await app(scope, receive, send)
    found: dict[str, Any] = msgspec.json.decode(bytes(answer))
    return status, found


async def run_lines(
    lines: Iterator[Line],
    answer: Callable[[Line], Awaitable[Result]],
    write: Callable[[Result], Awaitable[None]],
    *,
    may_start: Callable[[], Awaitable[None]],
    at_once: int,
) -> None:
    """Answer the lines, `at_once` at most, each after `may_start`, and write what came of them.

    Cancelling it cancels the lines that run; those are not written.
    """
    running: set[asyncio.Task[None]] = set()

    async def one(line: Line) -> None:
        await write(await answer(line))

    try:
        for line in lines:
            await may_start()
            while len(running) >= at_once:
                running = await _some_end(running)
            running.add(asyncio.create_task(one(line)))
        while running:
            running = await _some_end(running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _some_end(running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    ended, left = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in ended:
        task.result()
    return left
