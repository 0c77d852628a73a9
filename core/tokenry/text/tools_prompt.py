"""Tools in a prompt whose chat template knows of none.

In: messages, tools, the format in which calls are to be written. Out: messages in roles that any
template has: a system message that shows the tools and how to call them, earlier calls as the
assistant's text, results as the user's. Knows no template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenry.text.tools_formats import ToolFormat

_INTRODUCTION = (
    "You can call functions. Call one only if it is needed; its result will be sent to you.\n"
    "The functions, each with the JSON schema of its parameters:\n"
)
_FORMS = {
    "json": "{...}",
    "python": "key=value",
    "tags": "<parameter=key>\nvalue\n</parameter>\n",
}
_HOW = "\nTo call functions, answer with nothing but calls in this form:\n"


def with_tools(
    messages: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]], wanted: ToolFormat
) -> list[dict[str, Any]]:
    """The messages, with the tools and all earlier calls as plain text."""
    plain = [_plain(message, wanted) for message in messages]
    if not shown:
        return plain
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in shown)
    arguments = _FORMS[wanted.arguments]
    form = wanted.before + wanted.head.replace("NAME", "function_name") + arguments
    text = _INTRODUCTION + functions + _HOW + form + wanted.tail + wanted.after
    first = plain[0]
    if first["role"] in ("system", "developer") and isinstance(first["content"], str):
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _plain(message: Mapping[str, Any], wanted: ToolFormat) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role == "tool":
        name = message.get("name") or message.get("tool_call_id") or "the call"
        return {"role": "user", "content": f"Result of {name}:\n{_text(content)}"}
    calls = message.get("tool_calls")
    if role == "assistant" and isinstance(calls, list) and calls:
        written = (wanted.between or "\n").join(_written(call, wanted) for call in calls)
        text = f"{_text(content)}\n" if content else ""
        return {"role": role, "content": text + wanted.before + written + wanted.after}
    return dict(message)


def _written(call: Mapping[str, Any], wanted: ToolFormat) -> str:
    function = call.get("function") or {}
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if wanted.arguments != "json":
        given = json.loads(arguments)
        if wanted.arguments == "python":
            arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
        else:
            arguments = "".join(_tagged(key, value) for key, value in given.items())
    return wanted.head.replace("NAME", str(function.get("name"))) + arguments + wanted.tail


def _tagged(key: str, value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"<parameter={key}>\n{text}\n</parameter>\n"


def _text(content: Any) -> str:
    """Content as text: of parts, those that are text."""
    if isinstance(content, list):
        return "\n".join(
            str(part.get("text", "")) if isinstance(part, Mapping) else str(part)
            for part in content
        )
    return "" if content is None else str(content)
