"""Readers of tool calls whose parts are set off by marks: Mistral's and DeepSeek's.

In: an answer's text, in pieces. Out: content, and calls. Source of the formats: the chat templates
of Mistral v3 and v11, DeepSeek V3 and V3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenry.text.tools_parsers import Prose, RawObject
from tokenry.text.tools_scan import AnswerOnly, CallBegin, JsonCall, Marks, Piece, Scanner, joined


class Mistral(AnswerOnly):
    """[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...] or [TOOL_CALLS]name[ARGS]{...}."""

    def __init__(self, marks: Marks, known: frozenset[str]) -> None:
        self._scanner = Scanner(marks)
        self._known = known  # a name without arguments may be one that was cut
        self._prose = Prose()
        self._index = 0
        self._mode = "prose"
        self._head = ""
        self._call: JsonCall | None = None
        self._raw: RawObject | None = None

    def feed(self, text: str) -> list[Piece]:
        """What the text adds."""
        return self._read(self._scanner.feed(text))

    def flush(self) -> list[Piece]:
        """The end of the answer."""
        pieces = self._read(self._scanner.flush())
        if self._raw is not None:
            pieces += self._raw.close()
        elif self._mode == "head" and self._head.strip() in self._known:
            pieces += self._begin_raw()
            pieces += self._close()
        return joined([*pieces, *self._prose.flush()])

    def _read(self, parts: Sequence[tuple[str, bool]]) -> list[Piece]:
        pieces: list[Piece] = []
        for text, is_mark in parts:
            if text == "[TOOL_CALLS]" and is_mark:
                pieces += self._close()
                self._prose.call()
                self._mode, self._head = "head", ""
            elif is_mark and self._mode == "head":
                pieces += self._begin_raw()
                self._mode = "args" if text == "[ARGS]" else "id"
            elif is_mark:
                self._mode = "args" if self._mode == "id" else self._mode
            elif self._mode == "prose":
                pieces += self._prose.feed(text)
            elif self._mode == "head":
                pieces += self._read_head(text)
            elif self._mode == "list":
                pieces += self._read_list(text)
            elif self._mode == "args" and self._raw is not None:
                pieces += self._raw.feed(text)
        return joined(pieces)

    def _read_head(self, text: str) -> list[Piece]:
        """A name, or the list's first bracket."""
        self._head += text
        head = self._head.lstrip()
        if head[:1] in ("[", "{"):
            self._mode = "list"
            return self._read_list(head)
        name, brace, rest = self._head.partition("{")
        if not brace:
            return []
        self._head, self._mode = name, "args"
        pieces = self._begin_raw()
        assert self._raw is not None
        return [*pieces, *self._raw.feed(brace + rest)]

    def _begin_raw(self) -> list[Piece]:
        begin = CallBegin(self._index, self._head.strip())
        self._raw, self._head = RawObject(self._index), ""
        self._index += 1
        return [begin]

    def _close(self) -> list[Piece]:
        raw, self._raw = self._raw, None
        return [] if raw is None else raw.close()

    def _read_list(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        at = 0
        while at < len(text):
            if self._call is None:
                if text[at] != "{":
                    at += 1
                    continue
                self._call = JsonCall(self._index)
            found, used = self._call.feed(text[at:])
            at += used
            pieces += found
            self._index += sum(isinstance(piece, CallBegin) for piece in found)
            if self._call.rejected is not None:
                pieces += self._prose.feed(self._call.rejected)
            if self._call.done or self._call.rejected is not None:
                self._call = None
        return pieces


class DeepSeek(AnswerOnly):
    """<｜tool▁call▁begin｜>name<｜tool▁sep｜>{...}<｜tool▁call▁end｜>; V3 writes
    function<｜tool▁sep｜>name, a line break and the arguments in a fence.
    """

    CALL, SEP, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

    def __init__(self, marks: Marks, known: frozenset[str]) -> None:
        self._scanner = Scanner(marks)
        self._known = known  # a name without arguments may be one that was cut
        self._prose = Prose()
        self._index = 0
        self._mode = "prose"
        self._head = ""
        self._raw: RawObject | None = None

    def feed(self, text: str) -> list[Piece]:
        """What the text adds."""
        return self._read(self._scanner.feed(text))

    def flush(self) -> list[Piece]:
        """The end of the answer."""
        pieces = self._read(self._scanner.flush())
        return joined([*pieces, *self._close(), *self._prose.flush()])

    def _read(self, parts: Sequence[tuple[str, bool]]) -> list[Piece]:
        pieces: list[Piece] = []
        for text, is_mark in parts:
            if is_mark:
                pieces += self._mark(text)
            elif self._mode == "prose":
                pieces += self._prose.feed(text)
            elif self._mode == "head":
                self._head += text
            elif self._mode == "name":
                name, line_end, rest = (self._head + text).partition("\n")
                self._head = name
                if line_end:
                    pieces += [*self._begin(), *self._raw_feed(rest)]
            else:
                pieces += self._raw_feed(text)
        return joined(pieces)

    def _mark(self, mark: str) -> list[Piece]:
        if mark == self.CALL:
            pieces = self._close()
            self._mode, self._head = "head", ""
            return pieces
        if mark == self.SEP and self._mode == "head":
            if self._head.strip() == "function":
                self._mode, self._head = "name", ""
                return []
            return self._begin()
        self._prose.call()
        pieces = self._close()
        self._mode = "prose"
        return pieces

    def _begin(self) -> list[Piece]:
        begin = CallBegin(self._index, self._head.strip())
        self._raw, self._mode = RawObject(self._index), "args"
        self._index += 1
        return [begin]

    def _raw_feed(self, text: str) -> list[Piece]:
        return [] if self._raw is None else self._raw.feed(text)

    def _close(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._mode == "name" and self._head.strip() in self._known:
            pieces += self._begin()
        raw, self._raw = self._raw, None
        return pieces if raw is None else [*pieces, *raw.close()]
