"""From a chat's messages to its prompt: the model's chat template, with the tools and what else the
request has for it.

In: a `ChatRequest`. Out: a `Prompt`; a RequestError that names the field at fault. Where the
template knows of no tools, they are told in a message (text/tools_prompt.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenry.text.chat_sandbox  # noqa: F401  here, so that no request waits for it
from tokenry.api.run import Prompt
from tokenry.api.schema import ChatRequest
from tokenry.errors import RequestError
from tokenry.text.tokenizer import Tokenizer
from tokenry.text.tools import read_tools
from tokenry.text.tools_answer import AnswerFormat
from tokenry.text.tools_prompt import with_tools

_OWN_FIELDS = ("add_generation_prompt", "continue_final_message")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Raises RequestError that names the message at fault; contents are judged by the template."""
    if not messages:
        raise RequestError("There are no messages.", param="messages")
    for i, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(
                f"messages[{i}].role is {role!r}, it must be one of {', '.join(ROLES)}.",
                param=f"messages[{i}].role",
            )
        if role in ("system", "developer", "user") and message.get("content") is None:
            raise RequestError(f"messages[{i}].content is missing.", param=f"messages[{i}].content")


def render(
    chat: ChatRequest,
    tokenizer: Tokenizer,
    form: AnswerFormat | None = None,
    *,
    whole: bool = False,
) -> Prompt:
    """The prompt that the chat template makes of the messages and tools.

    form   how the model writes calls; None: as its template says.
    whole  however long it is, as for counting; else RequestError far beyond the context.
    """
    continued = bool(chat.continue_final_message)
    generation = chat.add_generation_prompt
    template = tokenizer.chat_template
    shown = read_tools(chat.tools, chat.tool_choice, chat.parallel_tool_calls).shown
    messages = [_for_template(message) for message in chat.messages]
    if "tools" not in template.text and (shown or _has_calls(messages)):
        form = form or AnswerFormat.of(tokenizer, "auto", "auto")
        messages, shown = with_tools(messages, shown, form.tools), ()
    text = template.render(
        messages,
        add_generation_prompt=(not continued) if generation is None else generation,
        continue_final_message=continued,
        tools=list(shown) or None,
        **{**_effort(chat, template.text), **_template_kwargs(chat)},
    )
    special = bool(chat.add_special_tokens)
    ids = tokenizer.encode(text, add_special_tokens=special, whole=whole, param="messages")
    return Prompt(token_ids=ids, text=text, param="messages")


def _has_calls(messages: Sequence[dict[str, Any]]) -> bool:
    return any(m.get("role") == "tool" or m.get("tool_calls") for m in messages)


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's content may be null, which most templates cannot join to their text; its
    thinking has two names.
    """
    if message.get("content") is None:
        message = {**message, "content": ""}
    thought = message.get("reasoning")
    if isinstance(thought, str) and "reasoning_content" not in message:
        message = {**message, "reasoning_content": thought}
    return message


def _effort(chat: ChatRequest, template: str) -> dict[str, Any]:
    """reasoning_effort for templates that have it; "none" switches thinking off."""
    effort = chat.reasoning_effort
    if effort is None:
        return {}
    if effort not in EFFORTS:
        raise RequestError(
            f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {effort!r}.",
            param="reasoning_effort",
        )
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    for name in ("enable_thinking", "thinking"):
        if name in template and effort == "none":
            return {name: False}
    raise RequestError(
        f"reasoning_effort {effort!r} cannot be served: this model's chat template does not "
        "read it.",
        param="reasoning_effort",
        code="unsupported",
        mend="leave it out, or see chat_template_kwargs",
    )


def _template_kwargs(chat: ChatRequest) -> dict[str, Any]:
    kwargs = chat.chat_template_kwargs or {}
    for name in ("messages", "chat_template", "tools", "self"):
        if name in kwargs:
            raise RequestError(
                f"chat_template_kwargs must not hold {name!r}.",
                param=f"chat_template_kwargs.{name}",
            )
    return {name: value for name, value in kwargs.items() if name not in _OWN_FIELDS}
