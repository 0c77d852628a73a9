"""Token ids to text, one by one: the pieces joined are exactly the decoded whole.

In: token ids as they are drawn. Out: text that later tokens cannot change; never part of a UTF-8
character. A byte-level decoder is a byte stream, decoded as one. Other decoders
(SentencePiece-like, WordPiece) look at a token's neighbours; for them the tokens that are not shown
yet are decoded behind an anchor, a few tokens already shown. Either way the work per token does not
grow with the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenry.text.tokenizer import Tokenizer

_ANCHOR = 4
_PROMPT_TAIL = 8


class Detokenizer(Protocol):
    """One stream of tokens."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens."""
        ...

    def flush(self) -> str:
        """The rest, at the end: an incomplete character becomes U+FFFD."""
        ...


def make_detokenizer(
    tokenizer: Tokenizer, *, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
) -> Detokenizer:
    """A detokenizer for the tokens after the prompt, so that the first keeps its leading space."""
    skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
    tail = [i for i in prompt_ids[-_PROMPT_TAIL:] if i not in skipped]
    if tokenizer.byte_level:
        return ByteDetokenizer(tokenizer, skipped=skipped, prompt_tail=tail)
    return WindowDetokenizer(tokenizer, skipped=skipped, prompt_tail=tail)


class ByteDetokenizer:
    """For byte-level decoders: tokens are bytes, and bytes are decoded as they come."""

    def __init__(
        self, tokenizer: Tokenizer, *, skipped: frozenset[int], prompt_tail: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # A character that the prompt began is finished by the answer.
        self.feed(prompt_tail)

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens."""
        token_bytes = self._tokenizer.token_bytes
        if len(token_ids) == 1:  # a step's one token
            token = token_ids[0]
            return "" if token in self._skipped else self._decoder.decode(token_bytes(token))
        return self._decoder.decode(
            b"".join(token_bytes(i) for i in token_ids if i not in self._skipped)
        )

    def flush(self) -> str:
        """The rest: an incomplete character as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For decoders that look at neighbours: decodes [anchor, pending] and shows what comes after
    the anchor.

    Runs of byte tokens ("<0xE4>") are held until they end: one wrong byte turns a whole run into
    U+FFFD.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skipped: frozenset[int], prompt_tail: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._shown = list(prompt_tail)
        while self._shown and self._shown[-1] in tokenizer.byte_ids:
            self._shown.pop()
        self._anchor: list[int] = []
        self._anchor_text = ""
        self._pending: list[int] = []
        self._retry_at = 0
        self._move_anchor()

    def feed(self, token_ids: Sequence[int]) -> str:
        """Text that became certain with these tokens."""
        pieces = []
        for token_id in token_ids:
            if token_id in self._skipped:
                continue
            self._pending.append(token_id)
            if token_id not in self._tokenizer.byte_ids and len(self._pending) >= self._retry_at:
                pieces.append(self._show(final=False))
        return "".join(pieces)

    def flush(self) -> str:
        """The rest, whatever it decodes to."""
        return self._show(final=True) if self._pending else ""

    def _show(self, *, final: bool) -> str:
        text = self._tokenizer.decode(self._anchor + self._pending, skip_special_tokens=False)
        unsure = text.endswith("\ufffd") and not self._tokenizer.byte_ids
        if not final and (unsure or not text.startswith(self._anchor_text)):
            # Trying again after each token would cost the square of a long run's length.
            held = len(self._pending)
            self._retry_at = 0 if held < 16 else held + held // 4
            return ""
        self._retry_at = 0
        new = text[len(self._anchor_text) :]
        self._shown = self._anchor + self._pending
        self._pending = []
        self._move_anchor()
        return new

    def _move_anchor(self) -> None:
        """The fewest last tokens that decode to some text: what a decoder strips at the beginning
        is behind them.
        """
        for size in range(1, min(_ANCHOR, len(self._shown)) + 1):
            tokens = self._shown[-size:]
            if tokens[0] in self._tokenizer.byte_ids:
                continue
            text = self._tokenizer.decode(tokens, skip_special_tokens=False)
            if text:
                self._anchor, self._anchor_text = tokens, text
                return
        self._anchor = self._shown
        self._anchor_text = self._tokenizer.decode(self._shown, skip_special_tokens=False)
