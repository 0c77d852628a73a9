"""From Anthropic's body to the chat route's: system, content blocks, tools.

In: the decoded body. Out: a chat body. What has no counterpart is a RequestError that names it by
its place in Anthropic's body.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tokenry.errors import RequestError


class MessagesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/messages; seed and ignore_eos are the chat route's."""

    model: str
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    seed: int | None = None
    ignore_eos: bool | None = None


def chat_body(wanted: MessagesRequest) -> dict[str, Any]:
    """The chat route's body."""
    messages = _system(wanted.system)
    for i, message in enumerate(wanted.messages):
        messages += _message(message, f"messages[{i}]")
    body: dict[str, Any] = {
        "model": wanted.model,
        "messages": messages,
        "max_tokens": wanted.max_tokens,
        "stop": wanted.stop_sequences or None,
        "temperature": wanted.temperature,
        "top_p": wanted.top_p,
        "top_k": wanted.top_k,
        "seed": wanted.seed,
        "ignore_eos": wanted.ignore_eos,
    }
    if wanted.stream:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body |= {"stream": True, "stream_options": options}
    if messages and messages[-1]["role"] == "assistant":  # a beginning to go on with
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    if wanted.tools:
        body["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(wanted.tools)]
    body |= _tool_choice(wanted.tool_choice) | _thinking(wanted.thinking)
    body |= _output(wanted.output_config)
    return {name: value for name, value in body.items() if value is not None}


def _system(system: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if not system:
        return []
    if isinstance(system, str):
        return [{"role": "system", "content": system}]
    return [{"role": "system", "content": _texts(system, "system")}]


def _message(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """A message as the chat route takes it; tool results become messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        raise RequestError(
            f"{where}.role is {role!r}, it must be user or assistant.", param=f"{where}.role"
        )
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise RequestError(
            f"{where}.content must be a string or a list of blocks.", param=f"{where}.content"
        )
    blocks: list[dict[str, Any]] = []
    before, calls = [], []
    for j, block in enumerate(content):
        at = f"{where}.content[{j}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result" and role == "user":
            before.append(_result(block, at))
        elif kind == "tool_use" and role == "assistant":
            calls.append(_call(block, at))
        elif kind in ("thinking", "redacted_thinking") and role == "assistant":
            continue  # earlier thoughts are not part of a prompt, in Anthropic's API neither
        else:
            blocks.append(block)
    texts = _texts(blocks, f"{where}.content")
    found: dict[str, Any] = {"role": role, "content": texts or None}
    if calls:
        found["tool_calls"] = calls
    return [*before, found] if texts or calls or not before else before


def _texts(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    texts = []
    for j, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text" or not isinstance(block.get("text"), str):
            raise RequestError(
                f"{where}[{j}] is of type {kind!r}; this model takes text only.",
                param=f"{where}[{j}]",
            )
        texts.append({"type": "text", "text": block["text"]})
    return texts


def _result(block: dict[str, Any], at: str) -> dict[str, Any]:
    content = block.get("content") or ""
    if isinstance(content, list):
        content = _texts(content, f"{at}.content")
    elif not isinstance(content, str):
        raise RequestError(f"{at}.content must be a string or blocks.", param=f"{at}.content")
    return {
        "role": "tool",
        "tool_call_id": _string(block, "tool_use_id", at),
        "content": content,
    }


def _call(block: dict[str, Any], at: str) -> dict[str, Any]:
    given = block.get("input") or {}
    if not isinstance(given, dict):
        raise RequestError(f"{at}.input must be an object.", param=f"{at}.input")
    name = _string(block, "name", at)
    function = {"name": name, "arguments": msgspec.json.encode(given).decode()}
    return {"id": _string(block, "id", at), "type": "function", "function": function}


def _tool(tool: dict[str, Any], at: str) -> dict[str, Any]:
    if tool.get("type", "custom") != "custom":
        raise RequestError(
            f"{at} is of type {tool['type']!r}; the server runs no tools by itself.",
            param=f"{at}.type",
            code="unsupported",
        )
    function = {"name": _string(tool, "name", at), "parameters": tool.get("input_schema") or {}}
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def _string(block: dict[str, Any], name: str, at: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{at}.{name} must be a string.", param=f"{at}.{name}")
    return value


def _tool_choice(choice: dict[str, Any] | None) -> dict[str, Any]:
    if choice is None:
        return {}
    kind = choice.get("type")
    names = {"auto": "auto", "any": "required", "none": "none"}
    if kind == "tool":
        function = {"name": _string(choice, "name", "tool_choice")}
        chosen: Any = {"type": "function", "function": function}
    elif isinstance(kind, str) and kind in names:
        chosen = names[kind]
    else:
        raise RequestError(
            f"tool_choice.type is {kind!r}, it must be auto, any, tool or none.",
            param="tool_choice.type",
        )
    single = {"parallel_tool_calls": False} if choice.get("disable_parallel_tool_use") else {}
    return {"tool_choice": chosen, **single}


def _thinking(thinking: dict[str, Any] | None) -> dict[str, Any]:
    kind = None if thinking is None else thinking.get("type")
    if kind in (None, "adaptive"):
        return {}
    if kind == "disabled":
        return {"chat_template_kwargs": {"enable_thinking": False}}
    raise RequestError(
        f"thinking of type {kind!r} cannot be served: a budget cannot be kept.",
        param="thinking",
        code="unsupported",
    )


def _output(config: dict[str, Any] | None) -> dict[str, Any]:
    """`output_config.format` is a JSON schema; `effort` is the chat's reasoning_effort."""
    body: dict[str, Any] = {}
    for name, value in (config or {}).items():
        if name == "format" and value:
            if not isinstance(value, dict) or value.get("type") != "json_schema":
                where = "output_config.format"
                raise RequestError(f"{where} must be of type json_schema.", param=where)
            schema = {"name": "output", "strict": True, "schema": value.get("schema")}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif name == "effort" and value:
            body["reasoning_effort"] = value
        elif name not in ("format", "effort"):
            where = f"output_config.{name}"
            raise RequestError(f"{where} cannot be served.", param=where, code="unsupported")
    return body
