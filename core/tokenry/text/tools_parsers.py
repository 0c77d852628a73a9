"""Readers of tool calls that are JSON objects, in tags or alone; and what all readers share.

In: an answer's text, in pieces. Out: content, and calls whose arguments come as they are written.
What looks like a call and is none stays content. Source of the formats: the chat templates of
Hermes 2 Pro, Qwen 2.5 and Llama 3.1. Knows no grammar and no wire.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenry.text.tools_scan import (
    AnswerOnly,
    CallArguments,
    CallBegin,
    Content,
    JsonCall,
    JsonEnd,
    Marks,
    Piece,
    Scanner,
    joined,
)


class Prose:
    """Content around calls, without the blanks between them."""

    def __init__(self) -> None:
        self._blanks = ""
        self._after_call = False

    def feed(self, text: str, drop: str = "") -> list[Piece]:
        """Content; blanks at its end wait for what follows. `drop` is no content after a call."""
        seen = self._blanks + text
        if self._after_call:
            seen = seen.lstrip(" \t\r\n" + drop)
        kept = seen.rstrip()
        self._blanks = seen[len(kept) :]
        if not kept:
            return []
        self._after_call = False
        return [Content(kept)]

    def call(self) -> None:
        """A call comes here."""
        self._blanks, self._after_call = "", True

    def flush(self) -> list[Piece]:
        """The end of the answer."""
        blanks, self._blanks = self._blanks, ""
        return [Content(blanks)] if blanks and not self._after_call else []


class RawObject:
    """Arguments that stand as a JSON object in the text; what is around it is not told."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._end = JsonEnd()
        self._begun = False

    def feed(self, text: str) -> list[Piece]:
        """More of the arguments."""
        if not self._begun:
            at = text.find("{")
            if at < 0:
                return []
            self._begun, text = True, text[at:]
        if self._end.done:
            return []
        return [CallArguments(self._index, text[: self._end.feed(text)])]

    def close(self) -> list[Piece]:
        """The call has ended."""
        return [] if self._begun else [CallArguments(self._index, "{}")]


class TaggedJson(AnswerOnly):
    """Hermes, Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, again and again."""

    def __init__(self, marks: Marks, open_mark: str) -> None:
        self._scanner = Scanner(marks)
        self._open_mark = open_mark
        self._prose = Prose()
        self._index = 0
        self._call: JsonCall | None = None

    def feed(self, text: str) -> list[Piece]:
        """What the text adds."""
        return self._read(self._scanner.feed(text))

    def flush(self) -> list[Piece]:
        """The end of the answer."""
        pieces = self._read(self._scanner.flush())
        return joined([*pieces, *self._abandon(), *self._prose.flush()])

    def _read(self, parts: Sequence[tuple[str, bool]]) -> list[Piece]:
        pieces: list[Piece] = []
        for text, is_mark in parts:
            if is_mark:
                pieces += self._abandon()
                if text == self._open_mark:
                    self._call = JsonCall(self._index)
                else:
                    self._prose.call()
            elif self._call is None:
                pieces += self._prose.feed(text)
            else:
                pieces += self._inside(text)
        return joined(pieces)

    def _inside(self, text: str) -> list[Piece]:
        assert self._call is not None
        if self._call.done:
            return []  # blanks before the closing mark
        found, used = self._call.feed(text)
        if self._call.rejected is not None:
            rejected = self._call.rejected
            self._call = None
            return self._prose.feed(self._open_mark + rejected + text[used:])
        if any(isinstance(piece, CallBegin) for piece in found):
            self._prose.call()
            self._index += 1
        return found

    def _abandon(self) -> list[Piece]:
        """The call that is open ends here, be it complete or not."""
        call, self._call = self._call, None
        raw = "" if call is None else call.flush()
        return self._prose.feed(self._open_mark + raw) if raw.strip() else []


class LeadingJson(AnswerOnly):
    """Llama 3.1, Gemma: the answer is one JSON object, or several, of functions that are known;
    perhaps in a fence. Any other answer is content.
    """

    def __init__(self, known: frozenset[str], openers: Sequence[str]) -> None:
        self._known = known
        self._openers = sorted(openers, key=len, reverse=True)
        self._prose = Prose()
        self._held = ""
        self._mode = "lead"
        self._index = 0
        self._call: JsonCall | None = None

    def feed(self, text: str) -> list[Piece]:
        """What the text adds."""
        if self._mode == "prose":
            return self._prose.feed(text, drop="`")
        self._held += text
        if self._mode == "lead":
            self._decide()
        if self._mode == "lead":
            return []
        text = self._held
        if self._mode == "prose":
            self._held = ""
            return self._prose.feed(text)
        return self._calls(text)

    def flush(self) -> list[Piece]:
        """The end of the answer: one object that was cut before it was a call is content."""
        held = self._held if self._index == 0 else ""
        if self._index and self._call is not None:
            held = self._call.flush()
        self._held = ""
        return joined([*self._prose.feed(held), *self._prose.flush()])

    def _decide(self) -> None:
        lead = self._held.lstrip()
        if not lead:
            return
        for opener in self._openers:
            if lead.startswith(opener):
                rest = lead[len(opener) :].lstrip()
                if rest:
                    self._mode = "calls" if rest[0] in "{[" else "prose"
                    self._skip = len(self._held) - len(rest)
                return
            if opener.startswith(lead):
                return
        self._mode = "prose"

    def _calls(self, text: str) -> list[Piece]:
        """`text` is all that is held: until the first call it is kept, to be content after all."""
        pieces: list[Piece] = []
        at = self._skip
        while at < len(text):
            if self._call is None:
                if text[at] == "{":
                    self._call = JsonCall(self._index, self._known)
                elif text[at] in "[],; \t\r\n":
                    at += 1
                    continue
                else:
                    return self._to_prose(pieces, text if not self._index else text[at:])
            found, used = self._call.feed(text[at:])
            at += used
            pieces += found
            if any(isinstance(piece, CallBegin) for piece in found):
                self._index += 1
                self._prose.call()
            if self._call.rejected is not None:
                rest = self._call.rejected + text[at:]
                return self._to_prose(pieces, text if not self._index else rest)
            if self._call.done:
                self._call = None
        if self._index:
            self._held, self._skip = "", 0
        else:
            self._skip = at
        return joined(pieces)

    def _to_prose(self, pieces: list[Piece], text: str) -> list[Piece]:
        self._mode, self._held, self._call = "prose", "", None
        return joined([*pieces, *self._prose.feed(text, drop="`")])
