"""One line in the log per request: what came in, what went out, how long it took.

In: the outputs of one prompt. Out: `Facts` at its end, for the metrics and the trace, and a line of
JSON at level info, logger `tokenry.requests`. The prompt itself is told only with --log-prompts:
prompts are the users' own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tokenry.api.caller import Caller
from tokenry.outputs import RequestOutput
from tokenry.params import SamplingParams

log = logging.getLogger("tokenry.requests")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What one prompt came to. Times are seconds on this process' monotonic clock, None until they
    happened; `scheduled_s` is the engine's, on the same machine's clock.

    num_answer, num_longest   tokens of all completions, and of the longest.
    reasons                   why its completions ended, sorted.
    """

    request_id: str
    model: str
    caller: Caller
    params: SamplingParams
    num_prompt: int
    num_cached: int
    num_answer: int
    num_longest: int
    reasons: tuple[str, ...]
    arrival_s: float
    scheduled_s: float | None
    first_token_s: float | None
    end_s: float

    @property
    def max_tokens(self) -> int | None:
        """Longest answer that it asked for."""
        return self.params.max_tokens

    @property
    def total_s(self) -> float:
        """From arrival to its end."""
        return self.end_s - self.arrival_s

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token."""
        return _between(self.arrival_s, self.first_token_s)

    @property
    def queue_s(self) -> float | None:
        """From arrival until it was scheduled."""
        return _between(self.arrival_s, self.scheduled_s)

    @property
    def prefill_s(self) -> float | None:
        """From being scheduled to the first token."""
        return _between(self.scheduled_s, self.first_token_s)

    @property
    def decode_s(self) -> float | None:
        """From the first token to its end."""
        return _between(self.first_token_s, self.end_s)

    @property
    def inference_s(self) -> float | None:
        """From being scheduled to its end."""
        return _between(self.scheduled_s, self.end_s)

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None for a single token."""
        if self.decode_s is None or self.num_longest < 2:
            return None
        return self.decode_s / (self.num_longest - 1)

    @property
    def missed(self) -> tuple[str, ...] | None:
        """Targets that it missed; None if it had none. A request that failed missed all it had."""
        params = self.params
        pairs = (
            ("ttft", params.ttft_target_ms, self.ttft_s),
            ("tpot", params.tpot_target_ms, self.tpot_s or 0.0),
            ("deadline", params.deadline_ms, self.total_s),
        )
        asked = [(name, target, took) for name, target, took in pairs if target is not None]
        if not asked:
            return None
        failed = "error" in self.reasons
        return tuple(
            name for name, target, took in asked if failed or took is None or took * 1000 > target
        )


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else max(0.0, end_s - start_s)


class Account:
    """What one prompt comes to. `prompt` is its text or its token ids, None if it must not be
    told.
    """

    def __init__(
        self,
        request_id: str,
        num_prompt: int,
        *,
        model: str,
        caller: Caller,
        params: SamplingParams,
        arrival_s: float,
        prompt: str | Sequence[int] | None,
    ) -> None:
        self._request_id = request_id
        self._num_prompt = num_prompt
        self._model = model
        self._caller = caller
        self._params = params
        self._prompt = prompt
        self._num_cached = 0
        self._num_answer: dict[int, int] = {}
        self._reasons: set[str] = set()
        self._arrival_s = arrival_s
        self._scheduled_s: float | None = None
        self._first_token_s: float | None = None

    def take(self, output: RequestOutput) -> None:
        """Count a delta, or the only output."""
        for one in output.outputs:
            count = len(one.token_ids)
            self._num_answer[one.index] = self._num_answer.get(one.index, 0) + count
            if one.finish_reason is not None:
                self._reasons.add(one.finish_reason)
        if self._first_token_s is None and output.metrics is not None:
            self._first_token_s = output.metrics.first_token_s
            self._scheduled_s = output.metrics.scheduled_s
            self._num_cached = output.num_cached_tokens

    def close(self, reason: str | None = None) -> Facts:
        """Tell it; `reason` ended what had not ended by itself (abort, error)."""
        reasons = {*self._reasons, *(() if reason is None else (reason,))}
        facts = Facts(
            request_id=self._request_id,
            model=self._model,
            caller=self._caller,
            params=self._params,
            num_prompt=self._num_prompt,
            num_cached=self._num_cached,
            num_answer=sum(self._num_answer.values()),
            num_longest=max(self._num_answer.values(), default=0),
            reasons=tuple(sorted(reasons)),
            arrival_s=self._arrival_s,
            scheduled_s=self._scheduled_s,
            first_token_s=self._first_token_s,
            end_s=time.monotonic(),
        )
        if log.isEnabledFor(logging.INFO):
            line = _line(facts)
            if self._prompt is not None:
                line["prompt"] = self._prompt
            log.info(msgspec.json.encode(line).decode(), extra={"fields": line})
        return facts


def _line(facts: Facts) -> dict[str, Any]:
    line: dict[str, Any] = {
        "request": facts.request_id,
        "http_request": facts.caller.request_id,
        "model": facts.model,
        "prompt_tokens": facts.num_prompt,
        "cached_tokens": facts.num_cached,
        "output_tokens": facts.num_answer,
        "ttft_s": None if facts.ttft_s is None else round(facts.ttft_s, 6),
        "total_s": round(facts.total_s, 6),
        "finish_reason": ",".join(facts.reasons),
    }
    if facts.caller.key is not None:
        line["key"] = facts.caller.key.name
    if facts.missed:
        line["missed_targets"] = facts.missed
    return line
