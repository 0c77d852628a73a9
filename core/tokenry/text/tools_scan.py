"""Reading marks and JSON in a stream of text that may be cut anywhere.

In: pieces of text. Out: what may be told now; never a part of a mark, never less for where the
pieces were cut. The events that all readers of answers give are declared here. Knows no format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Call number `index` (from 0) is of this function."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Piece = Content | Reasoning | CallBegin | CallArguments


class Reader(Protocol):
    """Reads one answer."""

    @property
    def is_thinking(self) -> bool:
        """Whether the next text is the model's thinking, as far as is known."""
        ...

    def feed(self, text: str) -> list[Piece]:
        """What the text adds."""
        ...

    def flush(self) -> list[Piece]:
        """What was held back, at the answer's end."""
        ...


class AnswerOnly:
    """A reader of what is never thinking."""

    is_thinking = False


class Marks:
    """A set of literal marks; shared by all who look for them. No mark begins another."""

    def __init__(self, marks: Iterable[str]) -> None:
        self.texts = tuple(sorted(set(marks), key=len, reverse=True))
        self.pattern = re.compile("|".join(re.escape(mark) for mark in self.texts) or "(?!)")
        self.longest = max(map(len, self.texts), default=0)
        self.beginnings = frozenset(m[:n] for m in self.texts for n in range(1, len(m)))


class Scanner:
    """Cuts a stream at marks."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._held = ""

    def feed(self, text: str) -> list[tuple[str, bool]]:
        """(text, whether it is a mark), in order; what may be a mark's beginning is held back."""
        text = self._held + text
        parts: list[tuple[str, bool]] = []
        at = 0
        for found in self._marks.pattern.finditer(text):
            if found.start() > at:
                parts.append((text[at : found.start()], False))
            parts.append((found[0], True))
            at = found.end()
        cut = len(text) - self._length_held(text, at)
        if cut > at:
            parts.append((text[at:cut], False))
        self._held = text[cut:]
        return parts

    def flush(self) -> list[tuple[str, bool]]:
        """What was held back: no mark."""
        held, self._held = self._held, ""
        return [(held, False)] if held else []

    def _length_held(self, text: str, at: int) -> int:
        longest = min(self._marks.longest - 1, len(text) - at)
        for size in range(longest, 0, -1):
            if text[-size:] in self._marks.beginnings:
                return size
        return 0


class Trimmed:
    """A text without the blanks around it: those at its beginning are dropped, those at its end so
    far are held back until more follows.
    """

    def __init__(self) -> None:
        self._begun = False
        self._blanks = ""

    def feed(self, text: str) -> str:
        """What may be told."""
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        seen = self._blanks + text
        kept = seen.rstrip()
        self._blanks = seen[len(kept) :]
        return kept

    def blanks(self) -> str:
        """The blanks that were held back, where they turn out to be wanted."""
        blanks, self._blanks = self._blanks, ""
        return blanks


class JsonEnd:
    """Where one JSON object or array ends in a stream; strings and escapes are minded."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.done = False

    def feed(self, text: str) -> int:
        """How many characters of the text belong to the value."""
        for i, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.done = True
                    return i + 1
        return len(text)


NAME_KEYS = ("name", "function", "tool_name")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "tool_arguments")


class JsonCall:
    """One call as a JSON object: {"name": ..., "arguments": {...}}, its keys in any order.

    The arguments are told as they come, once the name is known. An object without a name (or with
    one that is not `known`) is no call: `rejected` holds its text.
    """

    def __init__(self, index: int, known: frozenset[str] | None = None) -> None:
        self._index = index
        self._known = known
        self._raw = ""
        self._step: Callable[[str, list[Piece]], None] = self._open
        self._token = ""
        self._key = ""
        self._nested = 0
        self._value: JsonEnd | None = None
        self._name: str | None = None
        self._early = ""
        self._told_arguments = False
        self.done = False
        self.rejected: str | None = None

    def feed(self, text: str) -> tuple[list[Piece], int]:
        """Pieces, and how many characters belonged to the object."""
        pieces: list[Piece] = []
        for i, char in enumerate(text):
            if self._name is None:
                self._raw += char
            self._step(char, pieces)
            if self.done or self.rejected is not None:
                return joined(pieces), i + 1
        return joined(pieces), len(text)

    def flush(self) -> str:
        """The text of an object that was cut before it was a call."""
        raw, self._raw = self._raw, ""
        return raw if self._name is None else ""

    def _open(self, char: str, pieces: list[Piece]) -> None:
        if char == "{":
            self._step = self._between
        elif not char.isspace():
            self.rejected = self._raw

    def _between(self, char: str, pieces: list[Piece]) -> None:
        if char == '"':
            self._step, self._token = self._in_key, char
        elif char == "}":
            self._close(pieces)
        elif not char.isspace() and char != ",":
            self._reject()

    def _in_key(self, char: str, pieces: list[Piece]) -> None:
        self._token += char
        if char == '"' and not _ends_escaped(self._token):
            self._key = _loads(self._token)
            self._step = self._colon

    def _colon(self, char: str, pieces: list[Piece]) -> None:
        if char == ":":
            self._step = self._start
        elif not char.isspace():
            self._reject()

    def _start(self, char: str, pieces: list[Piece]) -> None:
        if char.isspace():
            return
        if char == "{" and self._key == "function":
            self._nested += 1
            self._step = self._between
        elif char in "{[":
            self._value = JsonEnd()
            self._step = self._container
            self._container(char, pieces)
        elif char == '"':
            self._step, self._token = self._string, char
        else:
            self._step = self._plain
            self._plain(char, pieces)

    def _container(self, char: str, pieces: list[Piece]) -> None:
        assert self._value is not None
        self._value.feed(char)
        if self._key in ARGUMENT_KEYS:
            self._argue(char, pieces)
        if self._value.done:
            self._step = self._between

    def _string(self, char: str, pieces: list[Piece]) -> None:
        self._token += char
        if char == '"' and not _ends_escaped(self._token):
            value = _loads(self._token)
            if self._key in NAME_KEYS and self._name is None:
                self._take_name(value, pieces)
            elif self._key in ARGUMENT_KEYS:  # JSON in a string, as on OpenAI's wire
                self._argue(value, pieces)
            if self.rejected is None:
                self._step = self._between

    def _plain(self, char: str, pieces: list[Piece]) -> None:
        if char in ",}":
            self._step = self._between
            self._between(char, pieces)
        elif char in '{["]:':
            self._reject()

    def _take_name(self, name: str, pieces: list[Piece]) -> None:
        if not name or (self._known is not None and name not in self._known):
            self._reject()
            return
        self._name, self._raw = name, ""
        pieces.append(CallBegin(self._index, name))
        if self._early:
            pieces.append(CallArguments(self._index, self._early))

    def _argue(self, text: str, pieces: list[Piece]) -> None:
        self._told_arguments = True
        if self._name is None:
            self._early += text
        else:
            pieces.append(CallArguments(self._index, text))

    def _close(self, pieces: list[Piece]) -> None:
        if self._nested:
            self._nested -= 1
        elif self._name is None:
            self.rejected = self._raw
        else:
            self.done = True
            if not self._told_arguments:
                pieces.append(CallArguments(self._index, "{}"))

    def _reject(self) -> None:
        """No call after all; once a call was told, what follows it cannot be untold."""
        if self._name is None:
            self.rejected = self._raw
        else:
            self.done = True


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with neighbours of one kind put together, without empty ones."""
    out: list[Piece] = []
    for piece in pieces:
        last = out[-1] if out else None
        if isinstance(piece, CallBegin):
            out.append(piece)
        elif not piece.text:
            continue
        elif isinstance(piece, CallArguments):
            if isinstance(last, CallArguments) and last.index == piece.index:
                out[-1] = CallArguments(piece.index, last.text + piece.text)
            else:
                out.append(piece)
        elif type(last) is type(piece):
            assert isinstance(last, (Content, Reasoning))
            out[-1] = type(piece)(last.text + piece.text)
        else:
            out.append(piece)
    return out


def _ends_escaped(string: str) -> bool:
    """Whether the last quote of a JSON string is an escaped one, or its first."""
    body = string[:-1]
    return len(string) == 1 or (len(body) - len(body.rstrip("\\"))) % 2 == 1


def _loads(string: str) -> str:
    """The text that a JSON string stands for; its own where it is none."""
    try:
        value = json.loads(string, strict=False)
    except ValueError:
        return string
    return value if isinstance(value, str) else string
