"""How far one request is in its grammar, and what may come next.

In: its tokens, one by one. Out: masks, and whether the answer is complete. The mask of the next
token is begun as soon as a token is taken in, on a thread of the compiler's, so that it is made
while the engine plans and the model runs. Knows no request and no logits.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, wait

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from tokenry.errors import RequestError
from tokenry.plan import Mask

Bits = NDArray[np.int32]


class Matcher:
    """Owned by the scheduler's request. One thread calls it; masks may be waited for on others."""

    def __init__(
        self, state: LLMatcher, threads: Executor, failed: Callable[[str], RequestError]
    ) -> None:
        self._state = state
        self._threads = threads
        self._failed = failed
        self._next: Future[Bits] | None = None

    def mask(self) -> Mask:
        """What may come next; the same until a token is taken in."""
        if self._next is None:
            self._next = self._threads.submit(self._compute)
        return self._next.result

    def accept(self, token_id: int) -> bool:
        """Take a token in; whether the answer is complete, so that nothing can follow.

        A token that the grammar does not have leaves it stuck: the next mask tells.
        """
        if self._next is not None:
            wait((self._next,))
            self._next = None
        if self._state.consume_token(token_id) and self._state.is_stopped():
            return True
        self.mask()
        return False

    def _compute(self) -> Bits:
        bits = self._state.compute_bitmask()
        if self._state.is_error():
            raise self._failed(self._state.get_error())
        return np.frombuffer(bits, np.int32)
