"""Reader of tool calls in Qwen3-Coder's tags: <function=name><parameter=key>value</parameter>.

In: an answer's text, in pieces. Out: content, and calls; a value is told when it has ended, as JSON
of the type that the function's schema gives it. Source of the format: the chat template of
Qwen3-Coder. Knows no grammar.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenry.text.tools_parsers import Prose
from tokenry.text.tools_scan import (
    AnswerOnly,
    CallArguments,
    CallBegin,
    Marks,
    Piece,
    Scanner,
    joined,
)

XML_MARKS = (
    "<tool_call>",
    "</tool_call>",
    "<function=",
    "</function>",
    "<parameter=",
    "</parameter>",
)


class XmlCalls(AnswerOnly):
    """Reads calls of the known functions; `known` has their parameters' schemas."""

    def __init__(self, marks: Marks, known: Mapping[str, Mapping[str, Any]]) -> None:
        self._scanner = Scanner(marks)
        self._known = known
        self._prose = Prose()
        self._index = 0
        self._mode = "prose"
        self._text = ""
        self._name = ""
        self._key = ""
        self._num_told = 0

    def feed(self, text: str) -> list[Piece]:
        """What the text adds."""
        return self._read(self._scanner.feed(text))

    def flush(self) -> list[Piece]:
        """The end of the answer; a call that was cut is left as it is."""
        pieces = self._read(self._scanner.flush())
        return joined([*pieces, *self._prose.flush()])

    def _read(self, parts: Sequence[tuple[str, bool]]) -> list[Piece]:
        pieces: list[Piece] = []
        for text, is_mark in parts:
            if is_mark and self._mode != "value":
                pieces += self._mark(text)
            elif is_mark and text == "</parameter>":
                pieces += self._value()
            elif self._mode == "prose":
                pieces += self._prose.feed(text)
            elif self._mode in ("name", "key"):
                pieces += self._head(text)
            elif self._mode == "value":
                self._text += text
        return joined(pieces)

    def _mark(self, mark: str) -> list[Piece]:
        pieces: list[Piece] = []
        if mark == "<function=":
            self._prose.call()
            self._mode, self._text = "name", ""
        elif mark == "<parameter=" and self._mode == "call":
            self._mode, self._text = "key", ""
        elif mark == "</function>" and self._mode == "call":
            closing = "}" if self._num_told else "{}"
            pieces.append(CallArguments(self._index - 1, closing))
            self._mode = "between"
        elif mark == "<tool_call>":
            self._prose.call()
            self._mode = "between"
        elif mark == "</tool_call>":
            self._prose.call()
            self._mode = "prose"
        return pieces

    def _head(self, text: str) -> list[Piece]:
        """A name up to its `>`."""
        head, closed, rest = (self._text + text).partition(">")
        self._text = head
        if not closed:
            return []
        if self._mode == "key":
            self._mode, self._key, self._text = "value", head.strip(), rest
            return []
        self._mode, self._name, self._num_told = "call", head.strip(), 0
        self._index += 1
        return [CallBegin(self._index - 1, self._name)]

    def _value(self) -> list[Piece]:
        """A whole value; one line break at each end is not part of it."""
        text = self._text.removeprefix("\n").removesuffix("\n")
        properties = self._known.get(self._name, {}).get("properties")
        schema = properties.get(self._key) if isinstance(properties, dict) else None
        before = ", " if self._num_told else "{"
        self._mode, self._num_told = "call", self._num_told + 1
        told = f"{before}{json.dumps(self._key)}: {_as_json(text, schema)}"
        return [CallArguments(self._index - 1, told)]


def _as_json(text: str, schema: object) -> str:
    """The value as JSON: a string as it stands, anything else as it is written if it is JSON."""
    if not is_text(schema):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            if text in ("True", "False", "None"):
                return {"True": "true", "False": "false", "None": "null"}[text]
        else:
            return text.strip()
    return json.dumps(text, ensure_ascii=False)


def is_text(schema: object) -> bool:
    """Whether values of this schema are strings, which stand in the tags without quotes."""
    if not isinstance(schema, dict):
        return False
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list) and values:
        return all(isinstance(value, str) for value in values)
    return schema.get("type") == "string"
