"""Which tokens break a sequence: strings of `dry_sequence_breakers` as token ids.

In: strings. Out: ids of the tokens whose text holds one of them, and of the token that a string
ends with where it takes several (as text-generation-webui finds it). Owned by Admission. The texts
of the vocabulary are made once, when the first request needs them.
"""

from __future__ import annotations

from tokenry.text.tokenizer import Tokenizer

MAX_KNOWN = 256
"""Strings whose tokens are remembered; beyond that all are forgotten."""


class Breakers:
    """Owned by Admission."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: list[str] | None = None
        self._known: dict[str, frozenset[int]] = {}

    def ids(self, breakers: tuple[str, ...]) -> tuple[int, ...]:
        """Ids of all their tokens, in order."""
        return tuple(sorted(frozenset().union(*(self._of(text) for text in breakers))))

    def _of(self, breaker: str) -> frozenset[int]:
        if breaker not in self._known:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            holders = {i for i, text in enumerate(self._vocabulary()) if breaker in text}
            ends = self._tokenizer.encode("a" + breaker, add_special_tokens=False)[-1:]
            self._known[breaker] = frozenset(holders.union(ends))
        return self._known[breaker]

    def _vocabulary(self) -> list[str]:
        if self._texts is None:
            ids = [[i] for i in range(self._tokenizer.vocab_size)]
            self._texts = self._tokenizer.core.decode_batch(ids, skip_special_tokens=False)
        return self._texts
