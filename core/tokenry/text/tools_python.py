"""Reader of tool calls written as a Python list.

In: an answer's text, in pieces. Out: content, or calls, told when the list has ended: Python values
become JSON only as a whole. Source of the format: the chat templates of Llama 3.2 and Llama 4.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence

from tokenry.text.tools_scan import (
    AnswerOnly,
    CallArguments,
    CallBegin,
    Content,
    Marks,
    Piece,
    Scanner,
    joined,
)


class Pythonic(AnswerOnly):
    """Llama 3.2 and 4: [name(key=value, ...), ...], told when the list has ended."""

    _LEAD = re.compile(r"\s*\[?\s*(?:[A-Za-z_][\w.]*)?\s*(?P<call>(?<=[\w\s])\()?")

    def __init__(self, marks: Marks) -> None:
        self._scanner = Scanner(marks)
        self._held: str | None = ""

    def feed(self, text: str) -> list[Piece]:
        """What the text adds."""
        return self._take(self._scanner.feed(text))

    def flush(self) -> list[Piece]:
        """The end of the answer."""
        pieces = self._take(self._scanner.flush())
        held, self._held = self._held, None
        return joined([*pieces, *(_python_calls(held) or [Content(held)])]) if held else pieces

    def _take(self, parts: Sequence[tuple[str, bool]]) -> list[Piece]:
        text = "".join(text for text, is_mark in parts if not is_mark)
        if self._held is None:
            return joined([Content(text)])
        self._held += text
        stripped = self._held.lstrip()
        lead = self._LEAD.match(self._held)
        may_be = not stripped or (
            stripped[0] == "["
            and lead is not None
            and (lead["call"] is not None or lead.end() == len(self._held))
        )
        if may_be:
            return []
        held, self._held = self._held, None
        return joined([Content(held)])


def _python_calls(text: str) -> list[Piece]:
    """The calls of a Python list; empty where it is none."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    calls = tree.elts if isinstance(tree, ast.List) else []
    pieces: list[Piece] = []
    for index, call in enumerate(calls):
        if not isinstance(call, ast.Call) or call.args or None in {k.arg for k in call.keywords}:
            return []
        try:
            arguments = {str(k.arg): _value(k.value) for k in call.keywords}
        except (ValueError, RecursionError):
            return []
        pieces += [
            CallBegin(index, ast.unparse(call.func)),
            CallArguments(index, json.dumps(arguments, ensure_ascii=False)),
        ]
    return pieces


def _value(node: ast.expr) -> object:
    """A literal; JSON's own words for its constants are taken, too."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return json.loads(node.id)
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            str(ast.literal_eval(key) if key is not None else ""): _value(value)
            for key, value in zip(node.keys, node.values, strict=True)
        }
    value: object = ast.literal_eval(node)
    return list(value) if isinstance(value, tuple) else value
