"""POST /v1/chat/completions: messages in, one answer or a stream of chunks out, as OpenAI's clients
take them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tokenry.api.answer import (
    RunningUsage,
    answer_stream,
    answer_whole,
    ignored_header,
    prompt_logprobs,
    usage_of,
)
from tokenry.api.body import read_json
from tokenry.api.run import Prompt, Run
from tokenry.api.schema import ChatRequest, chat_params, decode
from tokenry.api.service import Service, new_id, service_of
from tokenry.api.wire import clamp
from tokenry.errors import RequestError
from tokenry.outputs import CompletionOutput, Logprob, RequestOutput
from tokenry.text.tokenizer import Tokenizer

_OWN_FIELDS = ("add_generation_prompt", "continue_final_message")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


async def chat_completions(request: Request) -> Response:
    """The route."""
    service = service_of(request)
    data = await read_json(request)
    chat, unknown = decode(data, ChatRequest, strict=service.config.strict_params)
    model = service.check_model(chat.model)
    check_messages(chat.messages)
    params = chat_params(chat)
    service.admit()
    prompt = await asyncio.to_thread(render, chat, service.engine.tokenizer)
    answer = ChatAnswer(service, chat, model)
    run = Run(service, answer.id)
    run.submit(
        [prompt],
        params,
        kind="delta" if chat.stream else "final",
        priority=chat.priority or 0,
        cache_salt=chat.cache_salt or "",
        asked_tokens=params.max_tokens,
    )
    headers = ignored_header(unknown)
    if chat.stream:
        return answer_stream(service, run, answer.chunks(run, params.n), headers)
    return await answer_whole(request, service, run, answer.whole, headers)


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Raises RequestError that names the message at fault; contents are the template's to judge."""
    if not messages:
        raise RequestError("There are no messages.", param="messages")
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(
                f"messages[{i}].role is {role!r}, it must be one of {', '.join(ROLES)}.",
                param=f"messages[{i}].role",
            )


def render(chat: ChatRequest, tokenizer: Tokenizer) -> Prompt:
    """The prompt that the chat template makes of the messages."""
    continued = bool(chat.continue_final_message)
    generation = chat.add_generation_prompt
    text = tokenizer.chat_template.render(
        [_with_content(message) for message in chat.messages],
        add_generation_prompt=(not continued) if generation is None else generation,
        continue_final_message=continued,
        **_template_kwargs(chat),
    )
    ids = tokenizer.encode(text, add_special_tokens=bool(chat.add_special_tokens))
    return Prompt(token_ids=ids, text=text, param="messages")


def _with_content(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's content may be null, which most templates cannot join to their text."""
    return message if message.get("content") is not None else {**message, "content": ""}


def _template_kwargs(chat: ChatRequest) -> dict[str, Any]:
    kwargs = chat.chat_template_kwargs or {}
    for name in ("messages", "chat_template", "tools", "self"):
        if name in kwargs:
            raise RequestError(
                f"chat_template_kwargs must not hold {name!r}.",
                param=f"chat_template_kwargs.{name}",
            )
    return {name: value for name, value in kwargs.items() if name not in _OWN_FIELDS}


class ChatAnswer:
    """The answer's fields that do not change, and its two forms."""

    def __init__(self, service: Service, chat: ChatRequest, model: str) -> None:
        self.id = f"chatcmpl-{chat.request_id}" if chat.request_id else new_id("chatcmpl")
        self._chat = chat
        self._tokenizer = service.engine.tokenizer
        self._head = {
            "id": self.id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": service.fingerprint,
        }

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The chat.completion object."""
        answer = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(one) for one in outputs[0].outputs],
            "usage": usage_of(outputs),
        }
        if self._chat.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(outputs[0])
        return answer

    async def chunks(self, run: Run, n: int) -> AsyncGenerator[Any, None]:
        """chat.completion.chunk objects: roles first, in order; usage last, if asked for."""
        options = self._chat.stream_options
        include_usage = options is not None and bool(options.include_usage)
        continuous = options is not None and bool(options.continuous_usage_stats)
        usage, begun = RunningUsage(), False
        async for item in run.updates():
            if item is None:
                yield None
                continue
            usage.take(*item)
            told = {"usage": usage.as_json() if continuous else None} if include_usage else {}
            if not begun:
                begun = True
                for index in range(n):
                    yield {**self._chunk(index, {"role": "assistant", "content": ""}), **told}
            for one in item[1].outputs:
                yield {**self._delta(one), **told}
        if include_usage:
            yield {**self._chunk_head(), "choices": [], "usage": usage.as_json()}

    def _choice(self, one: CompletionOutput) -> dict[str, Any]:
        return {
            "index": one.index,
            "message": {"role": "assistant", "content": one.text, "refusal": None},
            "logprobs": self._logprobs(one),
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
        }

    def _delta(self, one: CompletionOutput) -> dict[str, Any]:
        delta = {"content": one.text} if one.text or not one.finished else {}
        return self._chunk(one.index, delta, self._logprobs(one), one.finish_reason)

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._chunk_head(), "choices": [choice]}

    def _logprobs(self, one: CompletionOutput) -> dict[str, Any] | None:
        if one.logprobs is None or not self._chat.logprobs:
            return None
        most = self._chat.top_logprobs or 0
        return {"content": [self._position(e, most) for e in one.logprobs], "refusal": None}

    def _position(self, entry: dict[int, Logprob], most: int) -> dict[str, Any]:
        tokens = [self._token(token_id, lp) for token_id, lp in entry.items()]
        ranked = sorted(zip(entry.values(), tokens, strict=True), key=lambda e: e[0].rank or 0)
        return {**tokens[0], "top_logprobs": [token for _, token in ranked[:most]]}

    def _token(self, token_id: int, lp: Logprob) -> dict[str, Any]:
        return {
            "token": lp.decoded_token,
            "logprob": clamp(lp.logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }
