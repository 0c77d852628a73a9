"""What a request is told: where its sampled tokens end it, its events, why it can never go on.

In: a request, what a step gave. Out: `TokensEvent`s and refusals. Called by Scheduler alone, who
owns the requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tokenry.engine.block_manager import BlockManager
from tokenry.engine.request import Request
from tokenry.errors import Refusal, RequestError
from tokenry.messages import FinishReason, TokensEvent


class Taken(msgspec.Struct, frozen=True, kw_only=True):
    """How many of a step's tokens the request took, and whether one of them ended it.

    complete   the last one completed its grammar: it belongs to the answer, unlike an end token.
    """

    count: int
    finish: FinishReason | None = None
    stop_reason: int | None = None
    complete: bool = False


def take_tokens(request: Request, token_ids: Sequence[int]) -> Taken:
    """Append the tokens until one ends the request; those after it are dropped."""
    tokens, matcher = request.tokens, request.matcher
    for count, token in enumerate(token_ids, 1):
        tokens.append(token)
        complete = matcher is not None and matcher.accept(token)
        ends = token in request.eos_ids or token in request.stop_ids
        if ends and request.num_output >= request.params.min_tokens:
            reason = None if token in request.eos_ids else token
            return Taken(count=count, finish="stop", stop_reason=reason)
        if complete:  # nothing could follow, so min_tokens has no say
            return Taken(count=count, finish="stop", complete=not ends)
        if len(tokens) >= request.max_len:
            return Taken(count=count, finish="length")
    return Taken(count=len(token_ids))


def event_of(request: Request, now_s: float, **news: Any) -> TokensEvent:
    """An event with `news` (fields of TokensEvent), the request's times, and the scores of its
    prompt when first told.
    """
    prompt_logprobs = None
    if request.scores_prompt:
        prompt_logprobs = tuple(request.prompt_logprobs)
        request.scores_prompt = False
    return TokensEvent(
        request_id=request.told_as,
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=request.num_cached,
        num_preemptions=request.epoch,
        queued_s=request.queued_s,
        scheduled_s=request.scheduled_s,
        event_s=now_s,
        **news,
    )


def check_length(num_prompt: int, max_tokens: int | None, max_model_len: int) -> None:
    """Raises RequestError for a prompt that is empty, or leaves no room for the answer wanted."""
    if num_prompt == 0:
        raise RequestError("The prompt has no tokens.", param="prompt")
    if num_prompt + (max_tokens != 0) > max_model_len:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. "
            f"However, your prompt has {num_prompt} tokens.",
            param="prompt",
            code="context_length_exceeded",
        )


def too_large(blocks: BlockManager, num_tokens: int) -> Refusal:
    """So many tokens need more blocks than there are."""
    return Refusal(
        message=f"The request needs {blocks.num_blocks_for(num_tokens)} KV blocks of "
        f"{blocks.block_size} tokens for its {num_tokens} tokens, the KV cache has "
        f"{blocks.num_usable}.",
        param="prompt",
        code="context_length_exceeded",
        mend="a shorter prompt or answer, or more memory for the KV cache (--memory-fraction)",
    )
