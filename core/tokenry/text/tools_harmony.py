"""Reader of GPT-OSS's answers: messages in channels, thinking and calls among them.

In: an answer's text with its marks, in pieces; it begins after `<|start|>assistant`. Out: reasoning
(channel analysis), content (final, and commentary to nobody), calls (to functions.NAME). Source of
the format: OpenAI's harmony, docs/format.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenry.text.tools_parsers import RawObject
from tokenry.text.tools_scan import (
    CallBegin,
    Content,
    Marks,
    Piece,
    Reasoning,
    Scanner,
    joined,
)

HARMONY_MARKS = (
    "<|start|>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "<|constrain|>",
)
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class Harmony:
    """One answer. Its header is read whole, its body as it comes."""

    def __init__(self, marks: Marks) -> None:
        self._scanner = Scanner(marks)
        self._header = ""
        self._body: str | None = None
        self._index = 0
        self._raw: RawObject | None = None

    @property
    def is_thinking(self) -> bool:
        """Whether the next text is in the channel of thinking, its header with it."""
        return self._body == "analysis" or (self._body is None and "analysis" in self._header)

    def feed(self, text: str) -> list[Piece]:
        """What the text adds."""
        return self._read(self._scanner.feed(text))

    def flush(self) -> list[Piece]:
        """The end of the answer; a header without a mark was no header."""
        pieces = self._read(self._scanner.flush())
        pieces += self._end()
        if self._body is None and "<|" not in self._header:
            pieces.append(Content(self._header))
        return joined(pieces)

    def _read(self, parts: Sequence[tuple[str, bool]]) -> list[Piece]:
        pieces: list[Piece] = []
        for text, is_mark in parts:
            if is_mark and text == "<|message|>" and self._body is None:
                pieces += self._begin()
            elif is_mark and text in ("<|end|>", "<|call|>", "<|return|>", "<|start|>"):
                pieces += self._end()
                self._header, self._body = "", None
                if text == "<|start|>":
                    self._header = text
            elif self._body is None:
                self._header += text
            elif not is_mark:
                pieces += self._inside(text)
        return joined(pieces)

    def _begin(self) -> list[Piece]:
        recipient = _RECIPIENT.search(self._header)
        channel = _CHANNEL.search(self._header)
        self._body = channel[1] if channel else "final"
        if recipient is None:
            return []
        self._body, self._raw = "call", RawObject(self._index)
        self._index += 1
        return [CallBegin(self._index - 1, recipient[1])]

    def _inside(self, text: str) -> list[Piece]:
        if self._raw is not None:
            return self._raw.feed(text)
        return [Reasoning(text) if self._body == "analysis" else Content(text)]

    def _end(self) -> list[Piece]:
        raw, self._raw = self._raw, None
        return [] if raw is None else raw.close()
