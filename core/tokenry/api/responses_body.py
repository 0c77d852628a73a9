"""From the body of OpenAI's responses to the chat route's, item by item.

In: the decoded body and the items of the conversation before it. Out: a chat body, and the input as
items that can be stored and listed. What has no counterpart is a RequestError that names its place.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from tokenry.errors import RequestError

Item = dict[str, Any]

REFUSED = {
    "conversation": "conversations are not kept; use previous_response_id",
    "prompt": "there are no stored prompts",
    "context_management": "contexts are never edited in silence",
    "max_tool_calls": "the server runs no tools by itself",
    "moderation": "nothing is moderated here",
    "image": "this model gives text only",
    "access_programs": "there are no access programs",
}
HARMLESS = (
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "user",
)
"""Fields that do not change the text; a prompt's beginning is cached without being asked."""
NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""The chat's names of our fields."""
_INCLUDES = ("message.output_text.logprobs", "reasoning.encrypted_content")
_SAME = (
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "seed",
    "stop",
    "top_k",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "priority",
    "cache_salt",
    "chat_template_kwargs",
)


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses; from `seed` on the fields are those that the chat route takes, too."""

    input: str | list[dict[str, Any]] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    truncation: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    background: bool | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def new_item_id(prefix: str) -> str:
    """`msg_…`."""
    return f"{prefix}_{uuid.uuid4().hex}"


def input_items(wanted: ResponsesRequest) -> list[Item]:
    """The input as items with ids."""
    given = wanted.input
    if given is None or given in ("", []):
        raise RequestError("input is missing.", param="input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_item(one, f"input[{i}]") for i, one in enumerate(given)]


def chat_body(
    wanted: ResponsesRequest, model: str, items: Sequence[Item], *, stream: bool
) -> dict[str, Any]:
    """The chat route's body for all items of the conversation."""
    messages = _messages(items)
    if wanted.instructions:
        messages.insert(0, {"role": "system", "content": wanted.instructions})
    body = {name: getattr(wanted, name) for name in _SAME}
    body |= {"model": model, "messages": messages, "max_tokens": wanted.max_output_tokens}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if wanted.top_logprobs is not None or "message.output_text.logprobs" in (wanted.include or ()):
        body |= {"logprobs": True, "top_logprobs": wanted.top_logprobs or 0}
    if wanted.tools:
        body["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(wanted.tools)]
    body |= _tool_choice(wanted.tool_choice) | _text(wanted.text) | _reasoning(wanted.reasoning)
    return {name: value for name, value in body.items() if value is not None}


def check(wanted: ResponsesRequest) -> None:
    """Raises RequestError for values that ask for what we cannot give."""
    if wanted.truncation not in (None, "disabled"):
        _unsupported("truncation", f"{wanted.truncation!r}: prompts are never cut in silence")
    for i, name in enumerate(wanted.include or ()):
        if name not in _INCLUDES:
            _unsupported(f"include[{i}]", f"{name!r}; known: {', '.join(_INCLUDES)}")
    if wanted.background and wanted.store is False:
        raise RequestError("background needs store: true.", param="store")
    if wanted.stream_options is not None and not wanted.stream:
        raise RequestError("stream_options needs stream: true.", param="stream_options")
    if len(wanted.metadata or {}) > 16:
        raise RequestError("metadata may have 16 keys.", param="metadata")


def renamed(error: RequestError) -> RequestError:
    """The chat route's error in our names."""
    head = re.match(r"\w+", error.param or "")
    if head and head[0] in NAMES:
        ours = NAMES[head[0]]
        error.message = error.message.replace(head[0], ours)
        error.param = ours
    return error


def _unsupported(param: str, why: str) -> None:
    raise RequestError(f"{param} cannot be served: {why}.", param=param, code="unsupported")


def _item(given: Item, where: str) -> Item:
    """An input item, checked, with an id and a status."""
    kind = given.get("type") or ("message" if "role" in given else None)
    if kind == "message":
        if not isinstance(given.get("role"), str):
            raise RequestError(f"{where}.role must be a string.", param=f"{where}.role")
        content = _parts(given.get("content"), given["role"], f"{where}.content")
        item = {"role": given["role"], "content": content}
        prefix = "msg"
    elif kind == "function_call":
        item = {name: _string(given, name, where) for name in ("call_id", "name", "arguments")}
        prefix = "fc"
    elif kind == "function_call_output":
        output = given.get("output")
        if not isinstance(output, str):
            output = _parts(output, "user", f"{where}.output")
        item = {"call_id": _string(given, "call_id", where), "output": output}
        prefix = "fco"
    elif kind == "reasoning":
        item = {name: given.get(name) or [] for name in ("summary", "content")}
        prefix = "rs"
    else:
        param = f"{where}.type"
        raise RequestError(f"{param} {kind!r} cannot be served.", param=param, code="unsupported")
    name = given.get("id")
    ours = name if isinstance(name, str) and name else new_item_id(prefix)
    return {"id": ours, "type": kind, **item, "status": "completed"}


def _parts(content: Any, role: str, where: str) -> list[Item]:
    own = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        return [_part(own, content)]
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts.", param=where)
    parts = []
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(
            part.get("text"), str
        ):
            raise RequestError(
                f"{where}[{j}] is of type {kind!r}; this model takes text only.",
                param=f"{where}[{j}]",
                mend='{"type": "input_text", "text": "..."}',
            )
        parts.append(_part(own, part["text"]))
    return parts


def _part(kind: str, text: str) -> Item:
    more: Item = {"annotations": []} if kind == "output_text" else {}
    return {"type": kind, "text": text, **more}


def _string(block: Item, name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string.", param=f"{where}.{name}")
    return value


def _messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Messages of the chat; calls join the assistant's message before them."""
    messages: list[dict[str, Any]] = []
    for item in items:
        kind = item["type"]
        if kind == "message":
            messages.append({"role": item["role"], "content": _content(item["content"])})
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = item["output"]
            content = output if isinstance(output, str) else _content(output)
            call_id = item["call_id"]
            messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
    return messages


def _content(parts: list[Item]) -> Any:
    if len(parts) == 1:
        return parts[0]["text"]
    return [{"type": "text", "text": part["text"]} for part in parts]


def _tool(tool: Item, where: str) -> Item:
    if tool.get("type") != "function":
        _unsupported(f"{where}.type", f"{tool.get('type')!r}; the server runs no tools by itself")
    names = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in names if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: str | Item | None) -> Item:
    if choice is None:
        return {}
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = {"name": _string(choice, "name", "tool_choice")}
        return {"tool_choice": {"type": "function", "function": function}}
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools = [
            {"type": "function", "function": {"name": tool.get("name")}}
            for tool in choice.get("tools") or ()
        ]
        allowed = {"mode": choice.get("mode", "auto"), "tools": tools}
        return {"tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}
    return {"tool_choice": choice}


def _text(text: Item | None) -> Item:
    for name, value in (text or {}).items():
        if name not in ("format", "verbosity") or (name == "verbosity" and value != "medium"):
            _unsupported(f"text.{name}", f"{value!r}")
    form = (text or {}).get("format")
    if not form:
        return {}
    if not isinstance(form, dict):
        raise RequestError("text.format must be an object.", param="text.format")
    if form.get("type") == "json_schema":
        schema = {name: value for name, value in form.items() if name != "type"}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"response_format": form}


def _reasoning(reasoning: Item | None) -> Item:
    for name, value in (reasoning or {}).items():
        if name != "effort" and value is not None:
            _unsupported(f"reasoning.{name}", f"{value!r}")
    effort = (reasoning or {}).get("effort")
    return {} if effort is None else {"reasoning_effort": effort}
