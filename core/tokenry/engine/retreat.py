"""How large a step may be after the device had no memory for one.

In: what a step had that did not fit, steps that did. Out: the most rows and tokens of the next
ones. The KV is allocated once, so what a step needs beyond it grows with its rows and tokens: the
bounds shrink until a step fits, and double again after a while without such an error. Owned by
Planner; knows no requests.
"""

from __future__ import annotations

import logging
import traceback

from tokenry.engine.limits import EngineLimits

log = logging.getLogger(__name__)
ALONE_TRIES = 4
"""So often a step of one request alone is tried before the request ends with an error."""
PATIENCE, MOST_PATIENCE = 16, 1024
"""Steps that must have fitted before the bounds double: twice PATIENCE after the first step that
did not fit, twice as many after each further one.
"""


class Retreat:
    """Owned by Planner.

    rows, tokens   most of a step now; a device that cannot continue a prompt keeps its tokens, for
                   a request must fit a step there.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._good = 0
        self._patience = PATIENCE
        self.rows, self.tokens = limits.max_num_seqs, limits.max_num_batched_tokens

    @property
    def on(self) -> bool:
        """Whether steps are smaller than the limits allow."""
        limits = self._limits
        return self.rows < limits.max_num_seqs or self.tokens < limits.max_num_batched_tokens

    def shrink(self, num_rows: int, num_tokens: int) -> None:
        """A step of that size did not fit."""
        self._good = 0
        self._patience = min(MOST_PATIENCE, 2 * self._patience)
        self.rows = max(1, min(self.rows, num_rows // 2))
        if self._limits.chunked_prefill and num_tokens > num_rows:  # a prompt's part was in it
            part = num_tokens // 2 if num_rows > 1 else num_tokens // 8
            self.tokens = max(self.rows, min(self.tokens, part))

    def fitted(self) -> None:
        """A step fitted."""
        if not self.on:
            return
        self._good += 1
        if self._good < self._patience:
            return
        self._good = 0
        self.rows = min(self._limits.max_num_seqs, 2 * self.rows)
        self.tokens = min(self._limits.max_num_batched_tokens, 2 * self.tokens)
        if not self.on:
            self._patience = PATIENCE
            log.info("steps are as large as the limits allow again")


def release_frames(error: BaseException | None) -> None:
    """Let go of what the frames of the error hold: the tensors of the step that did not fit, which
    would take the memory of the next one.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
