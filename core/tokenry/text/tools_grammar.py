"""The grammar that binds calls: Lark for what `grammar/` compiles.

In: a format, what a request says of tools, the tokenizer's special tokens. Out: Lark text. Each
function's arguments follow its own schema, as a grammar of its own, so that references inside it
hold. Knows no compiler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenry.errors import RequestError
from tokenry.structured import WHITESPACE
from tokenry.text.tools import Tool, ToolUse
from tokenry.text.tools_formats import ToolFormat
from tokenry.text.tools_scan import Marks, Scanner
from tokenry.text.tools_xml import is_text

_ANY_TEXT = "/(.|\\n)*/"
_NO_CALL = "/[^{\\[\\s](.|\\n)*/"
_ANALYSIS = "<|channel|>analysis<|message|>"
_NEXT = "<|end|><|start|>assistant"


def calls_lark(
    wanted: ToolFormat,
    use: ToolUse,
    special_ids: Mapping[str, int],
    *,
    answer: Mapping[str, Any] | None = None,
) -> str:
    """Rules from `start`.

    answer  JSON schema of an answer without calls (tool_choice auto), for formats that are
            `beside_json`; None: any text.
    """
    lark = _Lark(wanted, use, special_ids)
    rules = lark.calls()
    if use.mode != "auto":
        start = "calls"
    elif answer is not None:
        assert wanted.beside_json
        rules.append(f"answer: %json {schema_text(answer)}")
        start = f"{lark.final()} answer | calls"
    else:
        start = lark.anywhere(rules)
    if wanted.begins == "channel":
        thought = f"{lark.literal(_ANALYSIS)} TEXT {lark.literal(_NEXT)}"
        rules.append(f"thought: {thought}")
        start = f"thought? ({start})"
    return "\n".join([f"start: {start}", f"TEXT: {_ANY_TEXT}", *rules])


def schema_text(schema: Mapping[str, Any]) -> str:
    """The schema for `%json`, with our whitespace unless it brings its own."""
    guide = {"whitespace_pattern": WHITESPACE}
    return json.dumps({"x-guidance": guide, **schema}, ensure_ascii=False)


class _Lark:
    """The parts of one grammar."""

    def __init__(self, wanted: ToolFormat, use: ToolUse, special_ids: Mapping[str, int]) -> None:
        self._format = wanted
        self._use = use
        self._special_ids = special_ids
        self._marks = Marks(special_ids)

    def calls(self) -> list[str]:
        """Rules of `calls` and all below it."""
        f = self._format
        rules: list[str] = []
        for i, tool in enumerate(self._use.tools):
            rules += self._arguments(i, tool)
            head = self.literal(f.head.replace("NAME", tool.name))
            rules.append(f"call_{i}: {head} args_{i} {self.literal(f.tail)}")
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(self._use.tools))))
        several = ""
        if self._use.parallel and f.between is not None:
            several = f"({self.literal(f.between)} call)*"
        rules.append(f"calls: {self.literal(f.before)} call {several} {self.literal(f.after)}")
        return rules

    def anywhere(self, rules: list[str]) -> str:
        """`start` where the model may write text instead of calls, or before them."""
        f = self._format
        if f.begins == "channel":
            return f"{self.final()} TEXT | calls"
        if f.begins == "character":
            rules.append(f"PROSE: {_NO_CALL}")
            return "PROSE | calls"
        first = (f.before or f.head).partition("NAME")[0]
        mark = next(mark for mark in f.marks if first.startswith(mark))
        if mark in self._special_ids:
            return "TEXT | TEXT calls"
        trigger = json.dumps(mark, ensure_ascii=False)
        rules.append(f"opening[lazy]: {_ANY_TEXT} {trigger}")
        rules += self._without_mark(mark)
        return "TEXT | opening begun"

    def final(self) -> str:
        """What comes before an answer without calls."""
        if self._format.begins != "channel":
            return ""
        return self.literal("<|channel|>final<|message|>")

    def literal(self, text: str) -> str:
        """Text and special tokens in Lark."""
        scanner = Scanner(self._marks)
        parts = [*scanner.feed(text), *scanner.flush()]
        return " ".join(
            f"<[{self._special_ids[part]}]>" if is_mark else json.dumps(part, ensure_ascii=False)
            for part, is_mark in parts
        )

    def _without_mark(self, mark: str) -> list[str]:
        """Rules of `begun`: calls whose first mark has been written."""
        f = self._format
        rules, names = [], []
        several = ""
        if self._use.parallel and f.between is not None:
            several = f"({self.literal(f.between)} call)*"
        if f.before:
            rest = self.literal(f.before.removeprefix(mark))
            return [f"begun: {rest} call {several} {self.literal(f.after)}"]
        for i, tool in enumerate(self._use.tools):
            head = self.literal(f.head.replace("NAME", tool.name).removeprefix(mark))
            rules.append(f"begun_{i}: {head} args_{i} {self.literal(f.tail)}")
            names.append(f"begun_{i}")
        rules.append(f"begun: ({' | '.join(names)}) {several} {self.literal(f.after)}")
        return rules

    def _arguments(self, i: int, tool: Tool) -> list[str]:
        """Rules of `args_i`."""
        free = self._use.mode == "auto" and not tool.strict
        parameters: Mapping[str, Any] = {"type": "object"} if free else tool.parameters
        if self._format.arguments == "json":
            return [f"args_{i}: %json {schema_text(parameters)}"]
        tags = self._format.arguments == "tags"
        properties = dict(tool.parameters.get("properties") or {})
        shared = {k: v for k, v in tool.parameters.items() if k in ("$defs", "definitions")}
        required = [n for n in tool.parameters.get("required") or () if n in properties]
        rules, named = [], {}
        for j, (name, schema) in enumerate(properties.items()):
            value = {**shared, **schema} if isinstance(schema, dict) else schema
            head = f"<parameter={name}>\n" if tags else f"{name}="
            rules.append(f"arg_{i}_{j}: {json.dumps(head, ensure_ascii=False)} value_{i}_{j}")
            rules += _tagged(f"value_{i}_{j}", value) if tags else [_json(f"value_{i}_{j}", value)]
            named[name] = f"arg_{i}_{j}"
        optional = [named[name] for name in properties if name not in required]
        first = [named[n] for n in required]
        if tags:
            listed = " ".join([*first, *(f"{name}?" for name in optional)]) or '""'
        else:
            listed = _listed(first, optional)
        return [*rules, f"args_{i}: {listed}"]


def _json(rule: str, schema: Mapping[str, Any]) -> str:
    return f"{rule}: %json {schema_text(schema)}"


def _tagged(rule: str, schema: object) -> list[str]:
    """A value and its closing tag. Strings stand as they are: those of an enum, or any text of
    their lengths; a pattern cannot be kept there.
    """
    end = "\n</parameter>\n"
    if not is_text(schema):
        value = schema if isinstance(schema, dict) else {}
        return [f"{rule}: {rule}_json {json.dumps(end)}", _json(f"{rule}_json", value)]
    assert isinstance(schema, dict)
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values:
        texts = " | ".join(json.dumps(value + end, ensure_ascii=False) for value in values)
        return [f"{rule}: {texts}"]
    if "pattern" in schema or "format" in schema:
        raise RequestError(
            "tools: a string's pattern or format cannot be bound in this model's way to write "
            "calls (qwen3_coder).",
            param="tools",
            code="unsupported",
            mend="tool_choice auto without strict, or an enum",
        )
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    return [f"{rule}[lazy]: /(.|\\n){{{least},{most}}}/ {json.dumps(end)}"]


def _listed(required: list[str], optional: list[str]) -> str:
    """The required ones, then any of the optional ones in their order, with commas between."""
    tail = " ".join(f'(", " {name})?' for name in optional)
    if required:
        comma = ' ", " '
        return f"{comma.join(required)} {tail}"
    chains = [
        " ".join([name, *(f'(", " {later})?' for later in optional[k + 1 :])])
        for k, name in enumerate(optional)
    ]
    return " | ".join([*chains, '""'])
