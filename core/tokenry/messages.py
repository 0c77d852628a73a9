"""What crosses between a front (HTTP process, AsyncEngine, LLM) and the engine: msgspec structs,
msgpack on the wire.

In one direction commands, in the other events. In one process the same structs are passed as they
are, so offline
and served requests take one path. Knows no room.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tokenry.errors import Refusal
from tokenry.params import SamplingParams
from tokenry.plan import TokenLogprobs
from tokenry.pooling import PoolingFacts, PoolingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add", omit_defaults=True):
    """Start a request (n is 1 here: the front makes one per completion).

    priority      lower runs first, under the priority policy.
    filler        runs on what others leave: behind all that are none, and preempted for them.
    cache_salt    separates prefix-cache entries of tenants.
    eos_token_ids the model's own end tokens, unless params.ignore_eos.
    source        id of a request with the same prompt: its blocks are shared.
    beam_ids      with params.beam_width: under which the answers are told, the best first.
    pooling       the request ends with a vector after its prompt; params then has max_tokens 0.
    """

    request_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0
    filler: bool = False
    cache_salt: str = ""
    lora_name: str | None = None
    pooling: PoolingParams | None = None
    source: str | None = None
    beam_ids: tuple[str, ...] = ()


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Forget these requests now; unknown ids are ignored. No event answers an abort that the front
    asked for.
    """

    request_ids: tuple[str, ...]


class Query(msgspec.Struct, frozen=True, kw_only=True, tag="query"):
    """Ask for one of: stats, reset_prefix_cache, check_integrity. Answered by a `Reply` with the
    same id.
    """

    query_id: int
    what: Literal["stats", "reset_prefix_cache", "check_integrity"]


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """End the engine process after the step in flight."""


class TokensEvent(msgspec.Struct, frozen=True, kw_only=True, tag="tokens", omit_defaults=True):
    """News of one request.

    token_ids        new tokens since the last event; logprobs beside them if asked for.
    prompt_logprobs  whole, once, with the first token (or at the end if none was drawn).
    finish_reason    set in the last event; error then has the text if it is "error", and refusal
                     all there is to say if the request itself is at fault.
    stop_reason      the stop token id that ended it (None for EOS and length).
    complete         the last token completed the request's grammar: it belongs to the text, though
                     finish_reason is "stop".
    pooled           the vector of a pooling request, float32 little-endian, in its last event.
    times            monotonic seconds of the engine's clock: queued, first scheduled, this event.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    complete: bool = False
    error: str | None = None
    refusal: Refusal | None = None
    pooled: bytes | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queued_s: float = 0.0
    scheduled_s: float = 0.0
    event_s: float = 0.0


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """A sample of the engine's counters and gauges (names follow vLLM's metrics); sent at most once
    a second.

    num_prefilling  of those that run, how many have prompt tokens that no step took yet.
    num_device_ooms steps that the device had no memory for, and that were tried again.
    """

    num_running: int = 0
    num_prefilling: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_blocks: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_failures: int = 0
    op_fallbacks: dict[str, int] = {}
    uncompiled_launches: int = 0
    programs: int = 0
    num_requests_aborted: int = 0
    num_device_ooms: int = 0


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """Where the start is: phase name and share done (0..1)."""

    phase: str
    share: float = 0.0


class RequestLimits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What of a well-formed request this engine cannot serve, so that a front refuses it before it
    starts.

    max_top_k           largest top_k that the device draws from.
    priorities          whether the queue knows priorities.
    logits_processors   names of those installed; None: not told.
    unserved            fields of SamplingParams that the device, which draws by itself, cannot
                        honour.
    tokens              whether the model gives tokens at all; vectors: what vectors it gives, None
                        if none.
    """

    max_top_k: int | None = None
    priorities: bool = False
    logits_processors: tuple[str, ...] | None = None
    unserved: tuple[str, ...] = ()
    tokens: bool = True
    vectors: PoolingFacts | None = None


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine serves. Facts that a front needs and shows.

    sampling_defaults   fields of SamplingParams for requests that do not set them; max_tokens is
                        the most that any gets.
    """

    max_model_len: int
    num_blocks: int
    block_size: int
    vocab_size: int
    backend: str
    device_name: str
    architecture: str
    dtype: str
    ledger: dict[str, int]
    notes: tuple[str, ...] = ()
    limits: RequestLimits = RequestLimits()
    sampling_defaults: dict[str, int | float] = {}


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The start failed or the engine is dying: one cause, with its mend, as text."""

    message: str
    mend: str | None = None
    error_type: str = "TokenryError"


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag="reply"):
    """Answer to a `Query`: JSON-like data, or error text."""

    query_id: int
    data: dict[str, str | int | float | bool] = {}
    error: str | None = None


Command = AddRequest | Abort | Query | Shutdown
Event = TokensEvent | Stats | Progress | Ready | Failed | Reply
