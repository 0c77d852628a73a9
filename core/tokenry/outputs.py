"""What a caller gets back: names as users of vLLM know them.

Made by `text/` from the engine's events; read by `llm/`, `async_engine.py` and `api/`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One token's log-probability at a position; rank 1 is the most likely; decoded_token is its
    text alone.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion of a request.

    text, token_ids     so far (or, from a stream of deltas, since the last output).
    logprobs            one dict per token id: the chosen token first, then the most likely ones.
    finish_reason       None while running; "stop", "length" or "abort".
    stop_reason         the stop string or stop token id that ended it; None for EOS.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[dict[int, Logprob], ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether no more will come."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Seconds on the monotonic clock of the process that made the request; None until it
    happened.
    """

    arrival_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The state of one request: all of its completions so far.

    prompt_logprobs     one entry per prompt token, the first None.
    pooled              the vector of a pooling request, float32 little-endian, when it is finished.
    num_cached_tokens   prompt tokens whose KV came from the prefix cache.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    pooled: bytes | None = None
