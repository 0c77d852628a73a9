"""POST /v1/responses and what is done with a stored response: get, delete, cancel, its input items.

In: OpenAI's body. Out: a response object, or the events of its stream. The chat route answers; the
store keeps. A response in the background runs on when its client goes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from tokenry.api import routes
from tokenry.api.answer import ignored_header
from tokenry.api.body import read_json
from tokenry.api.caller import caller
from tokenry.api.chat import chat_completions, check_messages, render
from tokenry.api.inner import ask, body_of, is_answer, refuse
from tokenry.api.paging import QUERY, page
from tokenry.api.responses_body import (
    HARMLESS,
    REFUSED,
    ResponsesRequest,
    chat_body,
    check,
    input_items,
    renamed,
)
from tokenry.api.responses_events import Teller
from tokenry.api.responses_store import Record, ResponseStore
from tokenry.api.routes import get, post
from tokenry.api.schema import ChatRequest, decode, decode_known
from tokenry.api.service import service_of
from tokenry.api.sse import EVENTS, EventStream
from tokenry.api.wire import JSON
from tokenry.errors import RequestError, TokenryError

log = logging.getLogger("tokenry.api")
_PATH = "/v1/chat/completions"


async def create(request: Request) -> Response:
    """POST /v1/responses."""
    wanted, unknown = await _read(request)
    store = _store(request)
    items = input_items(wanted)
    model = service_of(request).check_model(wanted.model)
    before = store.conversation(wanted.previous_response_id)
    stream = bool(wanted.stream or wanted.background)
    teller = Teller(wanted, model)
    record = Record(response=teller.response, items=items, owner=caller().owner)
    client = _without_client(request) if wanted.background else request
    try:
        body = chat_body(wanted, model, [*before, *items], stream=stream)
        inner = await ask(client, chat_completions, _PATH, body)
    except RequestError as error:
        raise renamed(error) from error
    if not is_answer(inner):
        return inner
    headers = ignored_header(unknown)
    keep = store if teller.response["store"] else None
    if wanted.background:
        assert isinstance(inner, EventStream)
        return await _in_background(
            inner, teller, record, store, headers, stream=bool(wanted.stream)
        )
    if isinstance(inner, EventStream):
        events = _events(inner.events, teller, record, keep)
        return EventStream(events, headers, at_end=inner.at_end, manner=EVENTS)
    teller.begin()
    teller.take(teller.telling.whole(body_of(inner)))
    teller.end()
    if keep is not None:
        keep.put(record)
    return JSON(teller.response, headers=headers)


async def retrieve(request: Request) -> Response:
    """GET /v1/responses/{id}; with ?stream=true its events, if it streams in the background."""
    record = _store(request).get(request.path_params["id"])
    query = request.query_params
    if query.get("stream", "false") != "true":
        return JSON(record.response)
    if not record.events:
        raise RequestError(
            "Only a response that was created with background and stream can be streamed again.",
            param="stream",
        )
    after = query.get("starting_after", "-1")
    if not after.removeprefix("-").isdecimal():
        raise RequestError(f"starting_after {after!r} is no number.", param="starting_after")
    return EventStream(record.follow(int(after)), {}, at_end=lambda: None, manner=EVENTS)


async def delete(request: Request) -> Response:
    """DELETE /v1/responses/{id}."""
    name = request.path_params["id"]
    _store(request).delete(name)
    return JSON({"id": name, "object": "response", "deleted": True})


async def cancel(request: Request) -> Response:
    """POST /v1/responses/{id}/cancel: ends one that runs in the background."""
    record = _store(request).get(request.path_params["id"])
    if record.task is None:
        raise RequestError(
            "Only a response that was created with background: true can be cancelled.",
            mend="close the connection of any other",
        )
    record.task.cancel()
    await asyncio.wait([record.task])
    return JSON(record.response)


async def list_input_items(request: Request) -> Response:
    """GET /v1/responses/{id}/input_items."""
    record = _store(request).get(request.path_params["id"])
    return JSON(page(request, record.items))


async def count_input_tokens(request: Request) -> Response:
    """POST /v1/responses/input_tokens."""
    wanted, unknown = await _read(request)
    service = service_of(request)
    model = service.check_model(wanted.model)
    items = [*_store(request).conversation(wanted.previous_response_id), *input_items(wanted)]
    try:
        body = chat_body(wanted, model, items, stream=False)
        chat, _ = decode(body, ChatRequest, strict=True)
        check_messages(chat.messages)
        service.admit()
        prompt = await asyncio.to_thread(
            render, chat, service.engine.tokenizer, service.answer_format
        )
    except RequestError as error:
        raise renamed(error) from error
    count = {"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)}
    return JSON(count, headers=ignored_header(unknown))


async def _read(request: Request) -> tuple[ResponsesRequest, list[str]]:
    data = await read_json(request)
    refuse(data, REFUSED)
    strict = service_of(request).config.strict_params
    wanted, unknown = decode_known(
        data, ResponsesRequest, strict=strict, meaningless=[*HARMLESS, *REFUSED]
    )
    check(wanted)
    return wanted, unknown


def _store(request: Request) -> ResponseStore:
    store: ResponseStore = request.app.state.responses
    return store


async def _events(
    chunks: AsyncGenerator[Any, None], teller: Teller, record: Record, store: ResponseStore | None
) -> AsyncGenerator[Any, None]:
    """The stream's events; the record is stored at its end."""
    for event in teller.begin():
        yield event
    try:
        async for pieces in teller.telling.pieces(chunks):
            if pieces is None:
                yield None
                continue
            for event in teller.take(pieces):
                yield event
        last = teller.end()
    except TokenryError as error:
        last = teller.fail(error)
    if store is not None:
        store.put(record)
    for event in last:
        yield event


async def _in_background(
    inner: EventStream,
    teller: Teller,
    record: Record,
    store: ResponseStore,
    headers: dict[str, str],
    *,
    stream: bool,
) -> Response:
    """Run it without a client; answer with its events, or with it as it stands."""

    async def run() -> None:
        try:
            async for pieces in teller.telling.pieces(inner.events):
                events = teller.take(pieces or [])
                if stream:
                    record.tell(*events)
            last = teller.end()
        except asyncio.CancelledError:
            last = teller.cancel()
        except TokenryError as error:
            last = teller.fail(error)
        except Exception as error:  # whatever it is, who asks for the response must learn of it
            log.exception("a response in the background failed")
            last = teller.fail(TokenryError(f"The server failed: {type(error).__name__}."))
        finally:
            inner.at_end()
            await inner.events.aclose()
        if stream:
            record.tell(*last)
        store.put(record)

    began = teller.begin()
    if stream:
        record.tell(*began)
    store.put(record)
    record.task = asyncio.create_task(run())
    await asyncio.sleep(0)  # it has begun: whoever cancels it is heard
    if stream:
        follow = record.follow(-1)
        return EventStream(follow, headers, at_end=lambda: None, manner=EVENTS)
    return JSON(record.response, headers=headers)


def _without_client(request: Request) -> Request:
    """The request as one whose client never goes."""

    async def receive() -> Message:
        never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        return await never

    return Request(request.scope, receive)


ENDPOINTS = (
    post(
        "/v1/responses",
        create,
        "Answer, and keep the answer.",
        ResponsesRequest,
        refused=REFUSED,
    ),
    post("/v1/responses/input_tokens", count_input_tokens, "Tokens of an input.", ResponsesRequest),
    get(
        "/v1/responses/{id}",
        retrieve,
        "A stored response.",
        query={"stream": {"type": "boolean"}, "starting_after": {"type": "integer"}},
    ),
    routes.delete("/v1/responses/{id}", delete, "Forget a response."),
    post("/v1/responses/{id}/cancel", cancel, "End a response in the background."),
    get("/v1/responses/{id}/input_items", list_input_items, "A response's input.", query=QUERY),
)
