"""One line in the log per request: what came in, what went out, how long it took.

In: the outputs of one prompt. Out: a line of JSON at level info, logger `tokenry.requests`. The
prompt itself is told only with --log-prompts: prompts are the users' own.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from tokenry.outputs import RequestOutput

log = logging.getLogger("tokenry.requests")


class Account:
    """What one prompt has come to. `prompt` is its text or its token ids, None if it must not be
    told.
    """

    def __init__(
        self, request_id: str, num_prompt: int, *, prompt: str | Sequence[int] | None
    ) -> None:
        self._data: dict[str, Any] = {
            "request": request_id,
            "prompt_tokens": num_prompt,
            "cached_tokens": 0,
            "output_tokens": 0,
            "ttft_s": None,
        }
        self._prompt = prompt
        self._reasons: dict[int, str] = {}
        self._begun_s = time.monotonic()

    def take(self, output: RequestOutput) -> None:
        """Count a delta, or the only output."""
        data, metrics = self._data, output.metrics
        data["cached_tokens"] = max(data["cached_tokens"], output.num_cached_tokens)
        data["output_tokens"] += sum(len(one.token_ids) for one in output.outputs)
        for one in output.outputs:
            if one.finish_reason is not None:
                self._reasons[one.index] = one.finish_reason
        if metrics is not None and metrics.first_token_s is not None:
            data["ttft_s"] = round(metrics.first_token_s - metrics.arrival_s, 6)

    def close(self, reason: str | None = None) -> None:
        """Tell it; `reason` ended what had not ended by itself (abort, error)."""
        if not log.isEnabledFor(logging.INFO):
            return
        reasons = sorted({*self._reasons.values(), *(() if reason is None else (reason,))})
        line = {**self._data, "total_s": round(time.monotonic() - self._begun_s, 6)}
        line["finish_reason"] = ",".join(reasons)
        if self._prompt is not None:
            line["prompt"] = self._prompt
        log.info(msgspec.json.encode(line).decode())


def set_up_logging(level: str) -> None:
    """Everything of ours at this level or above goes to stderr, with time and origin."""
    ours = logging.getLogger("tokenry")
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    ours.handlers = [stream]
    ours.setLevel(level.upper())
    ours.propagate = False
