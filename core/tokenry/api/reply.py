"""One choice of a chat: its text told apart into thinking, content and tool calls, as OpenAI's
clients put it together again.

In: outputs of one completion. Out: the message of a whole answer, or the deltas of a stream: role,
a call's id and its name come once, its arguments in pieces. Knows no transport.
"""

from __future__ import annotations

import uuid
from typing import Any

from tokenry.outputs import CompletionOutput
from tokenry.text.tools import ToolUse
from tokenry.text.tools_answer import AnswerFormat
from tokenry.text.tools_scan import CallArguments, CallBegin, Content, Piece, Reasoning


class Reply:
    """One choice.

    special  the text has special tokens; those that are no marks are not to be told.
    """

    def __init__(
        self,
        form: AnswerFormat,
        use: ToolUse,
        prompt: str | None,
        *,
        special: bool,
        reasoning_shown: bool,
    ) -> None:
        self._form, self._use, self._prompt = form, use, prompt
        self._special = special
        self._shown = reasoning_shown
        self._reader = form.reader(use, prompt, drop_specials=special)
        self._token_ids: list[int] = []
        self._num_calls = 0
        self.num_reasoning = 0

    def message(self, one: CompletionOutput) -> dict[str, Any]:
        """The whole message."""
        texts = {Content: "", Reasoning: ""}
        calls: dict[int, dict[str, Any]] = {}
        for piece in self._pieces(one):
            if isinstance(piece, CallBegin):
                calls[piece.index] = self._call(piece)
            elif isinstance(piece, CallArguments):
                calls[piece.index]["function"]["arguments"] += piece.text
            else:
                texts[type(piece)] += piece.text
        content: str | None = texts[Content]
        if not content and (calls or texts[Reasoning]):
            content = None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if texts[Reasoning] and self._shown:
            message |= {"reasoning": texts[Reasoning], "reasoning_content": texts[Reasoning]}
        if calls:
            message["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"}
                for call in calls.values()
            ]
        return message

    def deltas(self, one: CompletionOutput) -> list[dict[str, Any]]:
        """What the output adds, in order."""
        deltas: list[dict[str, Any]] = []
        for piece in self._pieces(one):
            if isinstance(piece, Content):
                deltas.append({"content": piece.text})
            elif isinstance(piece, Reasoning):
                if self._shown:
                    deltas.append({"reasoning": piece.text, "reasoning_content": piece.text})
            elif isinstance(piece, CallBegin):
                deltas.append({"tool_calls": [self._call(piece)]})
            else:
                more = {"index": piece.index, "function": {"arguments": piece.text}}
                deltas.append({"tool_calls": [more]})
        return deltas

    def finish_reason(self, one: CompletionOutput) -> str | None:
        """`tool_calls` where the answer ended with calls; a named function's is `stop`, as
        OpenAI's.
        """
        if one.finish_reason == "stop" and self._num_calls and self._use.mode != "named":
            return "tool_calls"
        return one.finish_reason

    def _pieces(self, one: CompletionOutput) -> list[Piece]:
        self._token_ids += one.token_ids
        pieces = self._reader.feed(one.text)
        if one.finished:
            pieces += self._reader.flush()
            self.num_reasoning = self._form.num_reasoning(
                self._use, self._prompt, self._token_ids, special=self._special
            )
        self._num_calls += sum(isinstance(piece, CallBegin) for piece in pieces)
        return pieces

    def _call(self, begin: CallBegin) -> dict[str, Any]:
        length = self._form.tools.id_length
        name = uuid.uuid4().hex[:length]
        return {
            "index": begin.index,
            "id": name if length < 24 else f"call_{name}",
            "type": "function",
            "function": {"name": begin.name, "arguments": ""},
        }
