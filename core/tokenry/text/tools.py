"""Functions that a model may call, and whether it must: as requests have them.

In: the `tools`, `tool_choice`, `parallel_tool_calls` of OpenAI's API. Out: `ToolUse`, checked; a
RequestError that names the field at fault. Knows neither how a model writes its calls nor the wire.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenry.errors import RequestError

MAX_TOOLS = 512
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
Mode = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One function; `parameters` is the JSON schema of its arguments, `spec` what was sent."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool
    spec: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a request says of tools.

    tools     those that may be called now (tool_choice may name fewer than were sent).
    shown     the request's own list, for the chat template; empty where tool_choice is none.
    parallel  whether one answer may hold several calls.
    """

    tools: tuple[Tool, ...]
    shown: tuple[Mapping[str, Any], ...]
    mode: Mode
    parallel: bool

    @property
    def known(self) -> dict[str, Mapping[str, Any]]:
        """Functions that may be called, with their parameters' schemas."""
        return {tool.name: tool.parameters for tool in self.tools}

    @property
    def bound(self) -> bool:
        """Whether a grammar binds the calls: those that must come, and those of strict tools. One
        call only is bound, too, for nothing else ends the answer after it.
        """
        if self.mode == "auto":
            return not self.parallel or any(tool.strict for tool in self.tools)
        return self.mode != "none"


NO_TOOLS = ToolUse(tools=(), shown=(), mode="none", parallel=True)


def read_tools(tools: object, choice: object, parallel: bool | None) -> ToolUse:
    """What the three fields ask for. Raises RequestError."""
    if tools is None:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools.", param="tool_choice")
        return NO_TOOLS
    if not isinstance(tools, list) or not tools:
        raise RequestError("tools must be a list of at least one tool.", param="tools")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"{len(tools)} tools; at most {MAX_TOOLS} are taken.", param="tools")
    known = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names = [tool.name for tool in known]
    double = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if double is not None:
        raise RequestError(f"Two tools have the name {double!r}.", param="tools")
    mode, allowed = _choice(choice, names)
    return ToolUse(
        tools=tuple(tool for tool in known if tool.name in allowed) if mode != "none" else (),
        shown=tuple(tool.spec for tool in known) if mode != "none" else (),
        mode=mode,
        parallel=parallel is not False and mode != "named",
    )


def _tool(tool: object, where: str) -> Tool:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise RequestError(
            f"{where} is {kind!r}; only tools of type function are served.", param=f"{where}.type"
        )
    function = tool.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"{where}.function is missing.", param=f"{where}.function")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.function.name is {name!r}; a name has 1 to 64 of a-z, A-Z, 0-9, _, -, dot.",
            param=f"{where}.function.name",
        )
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise RequestError(
            f"{where}.function.parameters must be a JSON schema of an object.",
            param=f"{where}.function.parameters",
        )
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(
            f"{where}.function.strict must be true or false.", param=f"{where}.function.strict"
        )
    try:
        json.dumps(parameters)
    except RecursionError as error:
        raise RequestError(
            f"{where}.function.parameters is nested too deeply.",
            param=f"{where}.function.parameters",
        ) from error
    return Tool(name=name, parameters=parameters, strict=bool(strict), spec=tool)


def _choice(choice: object, names: Sequence[str]) -> tuple[Mode, Sequence[str]]:
    """The mode, and the names that may be called."""
    if choice is None or choice == "auto":
        return "auto", names
    if choice == "none":
        return "none", ()
    if choice == "required":
        return "required", names
    if isinstance(choice, dict) and choice.get("type") == "function":
        return "named", [_known(choice, "tool_choice", names)]
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(choice.get("allowed_tools", choice), names)
    raise RequestError(
        f"tool_choice is {choice!r}; it must be none, auto, required, or an object that names a "
        "function or allowed_tools.",
        param="tool_choice",
    )


def _allowed(allowed: object, names: Sequence[str]) -> tuple[Mode, Sequence[str]]:
    where = "tool_choice.allowed_tools"
    if not isinstance(allowed, dict) or not isinstance(allowed.get("tools"), list):
        raise RequestError(f"{where}.tools is missing.", param=f"{where}.tools")
    mode = allowed.get("mode", "auto")
    if mode not in ("auto", "required"):
        raise RequestError(f"{where}.mode must be auto or required.", param=f"{where}.mode")
    found = [_known(t, f"{where}.tools[{i}]", names) for i, t in enumerate(allowed["tools"])]
    if not found:
        raise RequestError(f"{where}.tools is empty.", param=f"{where}.tools")
    return ("required" if mode == "required" else "auto"), found


def _known(tool: object, where: str, names: Sequence[str]) -> str:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise RequestError(
            f"{where} names the function {name!r}; tools has {', '.join(names)}.",
            param=where,
        )
    return str(name)
