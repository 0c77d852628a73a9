"""From a user's request to the engine's commands, and from the engine's events to what the user
sees.

In: prompt token ids with SamplingParams; later `TokensEvent`s. Out: one `AddRequest` per completion
("{id}#{i}"), later `Update`s with a `RequestOutput` and the children to abort because a stop string
was found. LLM, AsyncEngine and the HTTP process each own one `OutputProcessor`. Knows no engine and
no transport.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from tokenry.errors import RequestError, StepFailed, TokenryError
from tokenry.messages import AddRequest, RequestLimits, TokensEvent
from tokenry.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from tokenry.params import SamplingParams
from tokenry.pooling import PoolingParams
from tokenry.text.admission import Admission
from tokenry.text.completion import Completion, logprobs_dict
from tokenry.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
OutputKind = Literal["cumulative", "delta", "final"]
"""Outputs hold everything so far / what is new of the completion that has news / everything, once,
at the end."""


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What one event meant to its request.

    output   None where there is nothing to tell (kind "final" before the end, text held back).
    abort    child ids that the engine should forget.
    error    the request failed, nothing more will come.
    """

    request_id: str
    output: RequestOutput | None = None
    abort: tuple[str, ...] = ()
    error: TokenryError | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last update."""
        return self.error is not None or (self.output is not None and self.output.finished)


class OutputProcessor:
    """Owns the text state of every request of one front.

    vocab_size   ids at or above are refused; without it what config.json beside the tokenizer says,
                 else the tokenizer's.
    limits       what else the engine refuses.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_model_len: int,
        vocab_size: int | None = None,
        limits: RequestLimits | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._admit = Admission(
            tokenizer,
            max_model_len=max_model_len,
            vocab_size=vocab_size or tokenizer.model_vocab_size or tokenizer.vocab_size,
            limits=limits or RequestLimits(),
        )
        self._requests: dict[str, RequestState] = {}

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Requests that are not finished."""
        return tuple(self._requests)

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        kind: OutputKind = "cumulative",
        priority: int = 0,
        filler: bool = False,
        cache_salt: str = "",
        lora_name: str | None = None,
        param: str = "prompt",
        pooling: PoolingParams | None = None,
    ) -> list[AddRequest]:
        """Commands that start the request: one per completion. Raises RequestError, and then
        nothing was started.
        """
        if request_id in self._requests:
            raise RequestError(
                f"A request with the id {request_id!r} is running.", param="request_id"
            )
        params = self._admit(prompt_ids, params, priority=priority, param=param, pooling=pooling)
        state = RequestState(
            request_id,
            tuple(prompt_ids),
            params,
            self._tokenizer,
            prompt=prompt,
            kind=kind,
            param=param,
        )
        self._requests[request_id] = state
        ids = tuple(child_id(request_id, i) for i in range(params.n))
        searched = params.beam_width > 0
        return [
            AddRequest(
                request_id=ids[i],
                source=ids[0] if i else None,
                beam_ids=ids if searched else (),
                token_ids=state.prompt_ids,
                params=_child_params(params, i),
                eos_token_ids=() if params.ignore_eos else self._tokenizer.eos_token_ids,
                priority=priority,
                filler=filler,
                cache_salt=cache_salt,
                lora_name=lora_name,
                pooling=pooling,
            )
            for i in range(1 if searched else params.n)
        ]

    def update(self, event: TokensEvent) -> Update | None:
        """What the event means; None if its request is gone (aborted, or stopped a step ago)."""
        request_id, _, index = event.request_id.rpartition("#")
        state = self._requests.get(request_id)
        if state is None:
            return None
        if event.finish_reason == "error":
            del self._requests[request_id]
            error = state.error_of(event)
            return Update(request_id=request_id, error=error, abort=state.unfinished(int(index)))
        try:
            update = state.update(int(index), event)
        except Exception as error:  # a tokenizer may do anything: its request fails, alone
            log.exception("the text of request %s could not be made", request_id)
            del self._requests[request_id]
            what = f"The text of this request could not be made: {type(error).__name__}: {error}."
            return Update(request_id=request_id, error=StepFailed(what), abort=state.unfinished())
        if state.finished:
            del self._requests[request_id]
        return update

    def abort(self, request_id: str) -> tuple[str, ...]:
        """Forget the request; the child ids that the engine should forget, too. Unknown ids give
        ().
        """
        state = self._requests.pop(request_id, None)
        return () if state is None else state.unfinished()

    def fail_all(self, error: TokenryError) -> list[Update]:
        """Every request fails with this error (the engine died)."""
        updates = [Update(request_id=request_id, error=error) for request_id in self._requests]
        self._requests.clear()
        return updates


class RequestState:
    """One request: its completions so far. Owned by OutputProcessor."""

    def __init__(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        prompt: str | None,
        kind: OutputKind,
        param: str,
    ) -> None:
        self.request_id = request_id
        self._param = param
        self.prompt_ids = prompt_ids
        self._prompt = prompt
        self._kind = kind
        self._tokenizer = tokenizer
        self._children = [
            Completion(i, prompt_ids, params, tokenizer, followed=kind != "final")
            for i in range(params.n)
        ]
        self._num_running = params.n
        self._times: RequestMetrics | None = None
        self._arrival_s = time.monotonic()
        self._scheduled_s: float | None = None
        self._first_token_s: float | None = None
        self._finished_s: float | None = None
        self._num_cached = 0
        self._prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
        self._prompt_logprobs_told = False
        self._pooled: bytes | None = None

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return self._num_running == 0

    def unfinished(self, but: int | None = None) -> tuple[str, ...]:
        """Ids of the children that the engine still runs."""
        return tuple(
            child_id(self.request_id, child.index)
            for child in self._children
            if child.finish_reason is None and child.index != but
        )

    def error_of(self, event: TokensEvent) -> TokenryError:
        """Why the engine ended the request; what it calls "prompt" has a name of its own here."""
        refusal = event.refusal
        if refusal is None:
            return StepFailed(event.error or "The engine could not compute this request.")
        error = refusal.error()
        error.param = self._param if error.param == "prompt" else error.param
        return error

    def update(self, index: int, event: TokensEvent) -> Update | None:
        """What the event of one child means to the request."""
        child = self._children[index]
        if child.finish_reason is not None:  # a stop string ended it, this token was under way
            return None
        if self._first_token_s is None and event.token_ids:
            self._first_token_s = time.monotonic()
            self._times = None
            self._scheduled_s = event.scheduled_s or None
        self._num_cached = max(self._num_cached, event.num_cached_tokens)
        if event.prompt_logprobs is not None and self._prompt_logprobs is None:
            entries = (logprobs_dict(entry, self._tokenizer) for entry in event.prompt_logprobs)
            self._prompt_logprobs = (None, *entries)
        self._pooled = event.pooled
        num_before = child.num_tokens
        text = child.take(event)
        abort: tuple[str, ...] = ()
        if child.finish_reason is not None:
            self._num_running -= 1
            self._finished_s = None if self._num_running else time.monotonic()
            self._times = None
            if event.finish_reason is None:
                abort = (child_id(self.request_id, index),)
        output = self._output(child, text, num_before)
        return Update(request_id=self.request_id, output=output, abort=abort)

    def _output(self, child: Completion, text: str, num_before: int) -> RequestOutput | None:
        """What is to be told now that the child has this text, and tokens after the first
        num_before.
        """
        outputs: tuple[CompletionOutput, ...]
        if self._kind == "final":
            told = self._num_running == 0
        else:
            told = bool(text) or child.num_tokens > num_before or child.finish_reason is not None
        if not told:
            return None
        prompt_logprobs = self._prompt_logprobs
        if self._kind == "delta":
            if self._prompt_logprobs_told:
                prompt_logprobs = None
            self._prompt_logprobs_told = self._prompt_logprobs is not None
            outputs = (child.since(num_before, text),)
        else:
            outputs = tuple(c.whole() for c in self._children)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=outputs,
            finished=self.finished,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self._num_cached,
            metrics=self._metrics(),
            pooled=self._pooled,
        )

    def _metrics(self) -> RequestMetrics:
        """The times so far; they change with the first token and with the end, not with others."""
        if self._times is None:
            self._times = RequestMetrics(
                arrival_s=self._arrival_s,
                scheduled_s=self._scheduled_s,
                first_token_s=self._first_token_s,
                finished_s=self._finished_s,
            )
        return self._times


def child_id(request_id: str, index: int) -> str:
    """Id of a request's completion inside the engine."""
    return f"{request_id}#{index}"


def _child_params(params: SamplingParams, index: int) -> SamplingParams:
    if index:  # the prompt is scored once, by the first
        params = msgspec.structs.replace(params, prompt_logprobs=None)
    if params.seed is None:
        return msgspec.structs.replace(params, n=1)
    seed = params.seed + index
    return msgspec.structs.replace(params, n=1, seed=seed if seed < 2**64 else seed - 2**64)
