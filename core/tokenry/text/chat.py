"""Messages to prompt text, through the model's Jinja chat template, as transformers renders it.

In: messages as in OpenAI's API. Out: the prompt's text; a template's complaint is a `RequestError`
about `messages`. Templates come with models from strangers: they run in a sandbox and see plain
data only. Knows no tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenry.errors import ModelLoadError, RequestError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
_END_MARK = "TOKENRY-CONTINUE-HERE "
"""Marks the end of the message to continue; the trailing space tells whether the template
strips."""
_LOOPS_OVER_PARTS = re.compile(
    r"for\s+\w+\s+in\s+[\w.\[\]'\"-]*content\b|content'?\"?\]?\s+is\s+(not\s+)?(string|iterable|sequence)"
)


class ChatTemplate:
    """The chat templates of a model ("default", "tool_use", ...), compiled when they are first
    used.
    """

    def __init__(self, sources: Mapping[str, str], *, special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def text(self) -> str:
        """Of all templates, to be searched for what they print."""
        return "\n".join(self._sources.values())

    def __bool__(self) -> bool:
        return bool(self._sources)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt for the messages.

        continue_final_message   the prompt ends inside the last message, for the model to go on
                                 with it.
        chat_template            the text of another template, or the name of one of the model's.
        kwargs                   variables that the template may read (`enable_thinking`,
                                 `documents`).
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other.",
                param="continue_final_message",
                mend="set add_generation_prompt to false",
            )
        source = self._choose(chat_template, tools)
        plain = _plain_messages(messages, keep_parts=bool(_LOOPS_OVER_PARTS.search(source)))
        if continue_final_message:
            _mark_end(plain)
        import jinja2

        variables = {**self._special_tokens, "documents": None, **_plain(kwargs)}
        try:
            text = self._template(source).render(
                **variables,
                messages=plain,
                tools=_plain(tools),
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateSyntaxError as error:
            raise RequestError(
                f"The chat template is not valid: line {error.lineno}: {error.message}.",
                param="chat_template",
                mend="--chat-template FILE",
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return _cut_at_mark(text) if continue_final_message else text

    def _choose(self, wanted: str | None, tools: Sequence[Any] | None) -> str:
        if wanted is not None:
            return self._sources.get(wanted, wanted)
        if tools and "tool_use" in self._sources:
            return self._sources["tool_use"]
        if "default" in self._sources:
            return self._sources["default"]
        if self._sources:
            raise RequestError(
                f"This model has the chat templates {', '.join(sorted(self._sources))}, "
                "none is the default.",
                param="chat_template",
                mend="name one as chat_template",
            )
        raise RequestError(
            "This model has no chat template, so it cannot turn messages into a prompt.",
            param="messages",
            mend=(
                "send a plain prompt to /v1/completions (LLM.generate), or start with "
                "--chat-template FILE"
            ),
        )

    def _template(self, source: str) -> jinja2.Template:
        if source not in self._compiled:
            if len(self._compiled) >= 32:  # templates that requests bring must not pile up
                self._compiled.clear()
            from tokenry.text.chat_sandbox import environment

            self._compiled[source] = environment().from_string(source)
        return self._compiled[source]


def read_templates(
    path: Path, tokenizer_config: Mapping[str, Any], file: str | Path | None = None
) -> dict[str, str]:
    """Templates by name: from the given file, else chat_template.jinja and chat_templates/, else
    tokenizer_config.
    """
    if file is not None:
        try:
            return {"default": Path(file).read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(
                f"The chat template {file} cannot be read: {error}.", mend="--chat-template FILE"
            ) from error
    found: dict[str, str] = {}
    configured = tokenizer_config.get("chat_template")
    if isinstance(configured, str):
        found["default"] = configured
    elif isinstance(configured, list):
        found.update({entry["name"]: entry["template"] for entry in configured})
    files = {"default": path / "chat_template.jinja"}
    files |= {entry.stem: entry for entry in (path / "chat_templates").glob("*.jinja")}
    for name, template in files.items():
        if template.is_file():
            found[name] = template.read_text(encoding="utf-8")
    return found


def _plain_messages(messages: Sequence[Message], *, keep_parts: bool) -> list[dict[str, Any]]:
    if not messages:
        raise RequestError("There are no messages.", param="messages")
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"messages[{i}] must be an object with a role.", param=f"messages[{i}].role"
            )
        if message.get("content") is None and message["role"] != "assistant":
            raise RequestError(f"messages[{i}].content is missing.", param=f"messages[{i}].content")
        entry: dict[str, Any] = _plain(message)
        entry["content"] = _content(entry.get("content"), f"messages[{i}].content", keep_parts)
        if entry.get("tool_calls"):
            _parse_arguments(entry["tool_calls"], f"messages[{i}].tool_calls")
        plain.append(entry)
    return plain


def _content(content: Any, where: str, keep_parts: bool) -> Any:
    """Content as the template takes it: parts stay a list only where the template reads parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts.", param=where)
    texts = []
    for j, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{where}[{j}] is of type {kind!r}; this model takes text only.",
                param=f"{where}[{j}]",
                mend='{"type": "text", "text": "..."}',
            )
        texts.append(part["text"])
    if keep_parts:
        return [{"type": "text", "text": text} for text in texts]
    return "\n".join(texts)


def _parse_arguments(calls: Any, where: str) -> None:
    """OpenAI's wire has a call's arguments as a JSON string, templates want the object."""
    for j, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except ValueError as error:
                at = f"{where}[{j}].function.arguments"
                raise RequestError(f"{at} is not valid JSON: {error}.", param=at) from error


def _mark_end(messages: list[dict[str, Any]]) -> None:
    content = messages[-1]["content"]
    if isinstance(content, str):
        messages[-1]["content"] = content + _END_MARK
    elif isinstance(content, list) and content:
        content[-1]["text"] += _END_MARK
    else:
        raise RequestError(
            "continue_final_message is set, but the last message has no text to continue.",
            param="continue_final_message",
        )


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_END_MARK.strip())
    if at < 0:
        raise RequestError(
            "continue_final_message is set, but the model's chat template does not print "
            "the last message.",
            param="continue_final_message",
        )
    # A template that strips the message has eaten the mark's space; then it would have eaten the
    # message's, too.
    return text[:at] if text.startswith(_END_MARK, at) else text[:at].rstrip()


def _plain(value: Any) -> Any:
    """A copy made of JSON's types only: a template may call no method of ours."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise RequestError(
        f"Messages hold a {type(value).__name__}; only JSON's types can be sent.", param="messages"
    )
