"""POST /v1/chat/completions: messages in, one answer or a stream of chunks out, as OpenAI's clients
take them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
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
from tokenry.api.chat_prompt import check_messages, render
from tokenry.api.reply import Reply
from tokenry.api.run import Run
from tokenry.api.schema import ChatRequest, chat_params, decode
from tokenry.api.service import Service, new_id, service_of
from tokenry.api.wire import clamp
from tokenry.outputs import CompletionOutput, Logprob, RequestOutput
from tokenry.params import SamplingParams
from tokenry.text.tools import ToolUse, read_tools
from tokenry.text.tools_answer import AnswerFormat

__all__ = ["ChatAnswer", "chat_completions", "check_messages", "render"]


async def chat_completions(request: Request) -> Response:
    """The route."""
    service = service_of(request)
    data = await read_json(request)
    chat, unknown = decode(data, ChatRequest, strict=service.config.strict_params)
    model = service.check_model(chat.model)
    check_messages(chat.messages)
    params = chat_params(chat, service.defaults)
    use = read_tools(chat.tools, chat.tool_choice, chat.parallel_tool_calls)
    service.admit()
    form = service.answer_format
    prompt = await asyncio.to_thread(render, chat, service.engine.tokenizer, form)
    answer = ChatAnswer(service, chat, model, use, prompt.text)
    params = answer_params(params, form, use, prompt.text or "")
    run = Run(service, answer.id)
    run.submit(
        [prompt],
        params,
        kind="delta" if chat.stream else "final",
        priority=chat.priority or 0,
        cache_salt=chat.cache_salt or "",
        asked_tokens=chat.max_completion_tokens or chat.max_tokens,
    )
    headers = ignored_header(unknown)
    if chat.stream:
        if params.structured_outputs is not None:
            await run.accepted()
        return answer_stream(service, run, answer.chunks(run, params.n), headers)
    return await answer_whole(request, service, run, answer.whole, headers)


def answer_params(
    params: SamplingParams, form: AnswerFormat, use: ToolUse, prompt: str
) -> SamplingParams:
    """With what binds the answer, and with the special tokens that are marks in it."""
    shape = form.shape(use, params.structured_outputs, prompt)
    params = msgspec.structs.replace(params, structured_outputs=shape)
    if form.needs_specials(use):
        params = msgspec.structs.replace(params, skip_special_tokens=False)
    return params


class ChatAnswer:
    """The answer's fields that do not change, and its two forms."""

    def __init__(
        self, service: Service, chat: ChatRequest, model: str, use: ToolUse, prompt: str | None
    ) -> None:
        self.id = f"chatcmpl-{chat.request_id}" if chat.request_id else new_id("chatcmpl")
        self._chat = chat
        self._tokenizer = service.engine.tokenizer
        self._form = service.answer_format
        self._use = use
        self._prompt = prompt
        self._replies: dict[int, Reply] = {}
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
        }
        answer["usage"] = usage_of(outputs, reasoning=self._num_reasoning)
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
                for chunk in self._deltas(one):
                    yield {**chunk, **told}
        usage.reasoning = self._num_reasoning
        if include_usage:
            yield {**self._chunk_head(), "choices": [], "usage": usage.as_json()}

    def _choice(self, one: CompletionOutput) -> dict[str, Any]:
        reply = self._reply(one.index)
        message = {"role": "assistant", "content": one.text, "refusal": None}
        return {
            "index": one.index,
            "message": message if reply is None else reply.message(one),
            "logprobs": self._logprobs(one),
            "finish_reason": one.finish_reason if reply is None else reply.finish_reason(one),
            "stop_reason": one.stop_reason,
        }

    def _deltas(self, one: CompletionOutput) -> list[dict[str, Any]]:
        """Chunks of what is new; the last one carries the log-probabilities and the end."""
        reply, logprobs = self._reply(one.index), self._logprobs(one)
        if reply is None:
            delta = {"content": one.text} if one.text or not one.finished else {}
            return [self._chunk(one.index, delta, logprobs, one.finish_reason)]
        deltas = reply.deltas(one)
        if not deltas and (one.finished or logprobs is not None):
            deltas = [{}]
        chunks = [self._chunk(one.index, delta) for delta in deltas[:-1]]
        if deltas:
            finish = reply.finish_reason(one)
            chunks.append(self._chunk(one.index, deltas[-1], logprobs, finish))
        return chunks

    def _reply(self, index: int) -> Reply | None:
        """What reads this choice; None where its text is its content."""
        if not self._form.reads(self._use):
            return None
        reply = self._replies.get(index)
        if reply is None:
            skipped = self._chat.skip_special_tokens is not False
            reply = self._replies[index] = Reply(
                self._form,
                self._use,
                self._prompt,
                special=skipped and self._form.needs_specials(self._use),
                reasoning_shown=self._chat.include_reasoning is not False,
            )
        return reply

    @property
    def _num_reasoning(self) -> int:
        return sum(reply.num_reasoning for reply in self._replies.values())

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
