"""POST /v1/completions: prompts in (text or token ids, one or many), completions out; what
evaluation tools use.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
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
from tokenry.api.run import Prompt, Run
from tokenry.api.schema import CompletionRequest, completion_params, decode
from tokenry.api.service import Service, new_id, service_of
from tokenry.api.wire import clamp
from tokenry.errors import RequestError
from tokenry.outputs import CompletionOutput, Logprob, RequestOutput
from tokenry.text.infill import Infill
from tokenry.text.tokenizer import Tokenizer

MAX_PROMPTS = 1024
PromptScores = tuple[dict[int, Logprob] | None, ...]


async def completions(request: Request) -> Response:
    """The route."""
    service = service_of(request)
    data = await read_json(request)
    wanted, unknown = decode(data, CompletionRequest, strict=service.config.strict_params)
    model = service.check_model(wanted.model)
    params = completion_params(wanted, service.defaults)
    service.admit()
    prompts = await asyncio.to_thread(read_prompts, wanted, service.engine.tokenizer)
    answer = CompletionAnswer(service, wanted, model, prompts)
    run = Run(service, answer.id)
    run.submit(
        prompts,
        params,
        kind="delta" if wanted.stream else "final",
        priority=wanted.priority or 0,
        cache_salt=wanted.cache_salt or "",
        asked_tokens=wanted.max_tokens,
    )
    headers = ignored_header(unknown)
    if wanted.stream:
        if params.structured_outputs is not None:
            await run.accepted()
        return answer_stream(service, run, answer.chunks(run), headers)
    return await answer_whole(request, service, run, answer.whole, headers)


def read_prompts(wanted: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of str, [str], [int] or [[int]]; with a suffix what asks for the middle."""
    if not wanted.suffix:
        return _read(wanted, tokenizer)
    infill = Infill.of(tokenizer)
    if infill is None:
        raise RequestError(
            "suffix cannot be served: this model has no fill-in-the-middle tokens.",
            param="suffix",
            code="unsupported",
        )
    if wanted.echo:
        raise RequestError("echo with a suffix would not give the text in order.", param="echo")
    plain = msgspec.structs.replace(wanted, add_special_tokens=False)
    begin = [] if wanted.add_special_tokens is False else tokenizer.encode("")
    suffix = tokenizer.encode(wanted.suffix, add_special_tokens=False)
    return [
        Prompt(token_ids=infill.prompt(p.token_ids, suffix, begin), text=p.text, param=p.param)
        for p in _read(plain, tokenizer)
    ]


def _read(wanted: CompletionRequest, tokenizer: Tokenizer) -> list[Prompt]:
    given = wanted.prompt
    if isinstance(given, str) or (_is_ids(given) and given):
        return [_prompt(given, "prompt", wanted, tokenizer)]
    if not isinstance(given, list):
        raise RequestError(
            "prompt must be a string, token ids, or a list of either.", param="prompt"
        )
    if not 0 < len(given) <= MAX_PROMPTS:
        raise RequestError(
            f"prompt must hold 1 to {MAX_PROMPTS} prompts, got {len(given)}.", param="prompt"
        )
    return [_prompt(one, f"prompt[{i}]", wanted, tokenizer) for i, one in enumerate(given)]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


def _prompt(value: Any, where: str, wanted: CompletionRequest, tokenizer: Tokenizer) -> Prompt:
    if isinstance(value, str):
        special = True if wanted.add_special_tokens is None else wanted.add_special_tokens
        ids = tokenizer.encode(value, add_special_tokens=special, param=where)
        return Prompt(token_ids=ids, text=value, param=where)
    if _is_ids(value):
        return Prompt(token_ids=value, text=None, param=where)
    raise RequestError(f"{where} must be a string or a list of token ids.", param=where)


def best(outputs: Sequence[CompletionOutput], n: int) -> list[CompletionOutput]:
    """The n with the largest log-probability per token, in this order, where more were made."""
    if len(outputs) <= n:
        return list(outputs)

    def score(one: CompletionOutput) -> float:
        return (one.cumulative_logprob or 0.0) / max(1, len(one.token_ids))

    ranked = sorted(outputs, key=score, reverse=True)[:n]
    return [dataclasses.replace(one, index=i) for i, one in enumerate(ranked)]


class CompletionAnswer:
    """The answer's fixed fields, and its two forms. Choice = prompt * n + completion."""

    def __init__(
        self,
        service: Service,
        wanted: CompletionRequest,
        model: str,
        prompts: Sequence[Prompt],
    ) -> None:
        self.id = f"cmpl-{wanted.request_id}" if wanted.request_id else new_id("cmpl")
        self._wanted = wanted
        self._n = wanted.n or 1
        self._tokenizer = service.engine.tokenizer
        self._prompts = prompts
        self._offsets: dict[int, int] = {}
        self._prompt_scores: dict[int, PromptScores] = {}
        self._echoed: set[int] = set()
        self._head = {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": service.fingerprint,
        }

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The text_completion object."""
        choices = [
            self._choice(i, output, one)
            for i, output in enumerate(outputs)
            for one in best(output.outputs, self._n)
        ]
        return {**self._head, "choices": choices, "usage": usage_of(outputs)}

    async def chunks(self, run: Run) -> AsyncGenerator[Any, None]:
        """text_completion objects with what is new; usage last, if asked for."""
        options = self._wanted.stream_options
        include_usage = options is not None and bool(options.include_usage)
        continuous = options is not None and bool(options.continuous_usage_stats)
        usage = RunningUsage()
        async for item in run.updates():
            if item is None:
                yield None
                continue
            usage.take(*item)
            told = {"usage": usage.as_json() if continuous else None} if include_usage else {}
            for one in item[1].outputs:
                yield {**self._head, "choices": [self._choice(item[0], item[1], one)], **told}
        if include_usage:
            yield {**self._head, "choices": [], "usage": usage.as_json()}

    def _choice(self, i: int, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        index = i * self._n + one.index
        if output.prompt_logprobs is not None:
            self._prompt_scores[i] = output.prompt_logprobs  # a stream tells them once
        first = index not in self._echoed
        self._echoed.add(index)
        echo = bool(self._wanted.echo) and first
        text = (self._prompt_text(i) if echo else "") + (one.text if self._more else "")
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, i, output, one, echo),
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
        }
        if self._wanted.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output)
        return choice

    @property
    def _more(self) -> bool:
        return self._wanted.max_tokens != 0

    def _prompt_text(self, i: int) -> str:
        prompt = self._prompts[i]
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=False)

    def _logprobs(
        self, index: int, i: int, output: RequestOutput, one: CompletionOutput, echo: bool
    ) -> dict[str, Any] | None:
        most = self._wanted.logprobs
        if most is None:
            return None
        entries: list[tuple[int, dict[int, Logprob] | None]] = []
        if echo:
            known = self._prompt_scores.get(i) or (None,) * len(output.prompt_token_ids)
            entries += zip(output.prompt_token_ids, known, strict=True)
        if self._more:
            entries += zip(one.token_ids, one.logprobs or (), strict=False)
        return self._table(index, entries, most)

    def _table(
        self, index: int, entries: Iterable[tuple[int, dict[int, Logprob] | None]], most: int
    ) -> dict[str, Any]:
        table: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        offset = self._offsets.get(index, 0)
        for token_id, entry in entries:
            text = self._tokenizer.token_text(token_id)
            table["tokens"].append(text)
            table["text_offset"].append(offset)
            offset += len(text)
            chosen = None if entry is None else clamp(entry[token_id].logprob)
            table["token_logprobs"].append(chosen)
            table["top_logprobs"].append(None if entry is None else _top(token_id, entry, most))
        self._offsets[index] = offset
        return table


def _top(token_id: int, entry: dict[int, Logprob], most: int) -> dict[str, float]:
    """The most likely tokens and the chosen one; of two tokens with one text the likelier stays."""
    ranked = sorted(entry.items(), key=lambda e: e[1].rank or 0)
    kept = [e for i, e in enumerate(ranked) if i < most or e[0] == token_id]
    top: dict[str, float] = {}
    for _, lp in kept:
        top.setdefault(lp.decoded_token or "", clamp(lp.logprob))
    return top
