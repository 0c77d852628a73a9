"""How one model's answers are read: its ways to think and to call, and the tokens that are marks.

In: a tokenizer with its chat template, what the server was told. Out: `AnswerFormat`, which makes a
reader for each answer and the shape that a request's tools and response_format bind it to. Knows
no wire.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from tokenry.errors import RequestError
from tokenry.structured import StructuredOutputs, Thinking, is_one_token
from tokenry.text.detokenizer import make_detokenizer
from tokenry.text.reasoning import (
    HARMONY,
    Plain,
    ReasoningFormat,
    ThinkingReader,
    choose_reasoning,
)
from tokenry.text.tokenizer import Tokenizer
from tokenry.text.tools import ToolUse
from tokenry.text.tools_formats import ToolFormat, choose_format
from tokenry.text.tools_grammar import calls_lark
from tokenry.text.tools_scan import Marks, Piece, Reader, Scanner, joined

_HARMONY_THINKING = Thinking(
    begin="<|channel|>analysis<|message|>",
    end="<|end|><|start|>assistant<|channel|>final<|message|>",
    skipped="<|channel|>final<|message|>",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """Of one model.

    channels       its thinking and its calls are read together, by channels (harmony).
    specials       texts of special tokens, which are told only if they are asked for.
    one_token_ids  of tokens that a grammar takes as one.
    """

    tokenizer: Tokenizer
    tools: ToolFormat
    reasoning: ReasoningFormat | None
    channels: bool
    specials: frozenset[str]
    one_token_ids: dict[str, int]
    tool_marks: Marks = field(repr=False)
    thinking_marks: Marks = field(repr=False)
    dropped: Marks = field(repr=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer, tool_parser: str, reasoning_parser: str) -> AnswerFormat:
        """Chosen by the template where a parser is "auto". Raises ConfigError."""
        template = tokenizer.chat_template.text
        tools = choose_format(tool_parser, template)
        reasoning = choose_reasoning(reasoning_parser, template)
        added = tokenizer.core.get_added_tokens_decoder()
        special = frozenset(t.content for t in added.values() if t.special)
        thinking = () if reasoning is None else reasoning.marks
        channels = reasoning_parser == HARMONY or (
            reasoning_parser == "auto" and tools.name == HARMONY
        )
        tools = choose_format(HARMONY, template) if channels else tools
        return cls(
            tokenizer=tokenizer,
            tools=tools,
            reasoning=None if channels else reasoning,
            channels=channels,
            specials=special,
            one_token_ids={
                t.content: i for i, t in added.items() if is_one_token(t.content, t.special)
            },
            tool_marks=Marks(tools.marks),
            thinking_marks=Marks(thinking),
            dropped=Marks(special - {*tools.marks, *thinking}),
        )

    def reads(self, use: ToolUse) -> bool:
        """Whether answers have more than plain content."""
        return bool(use.tools) or self.reasoning is not None or self.channels

    def needs_specials(self, use: ToolUse) -> bool:
        """Whether special tokens must come with the text, as some are marks."""
        marks = set(self.thinking_marks.texts)
        if use.tools or self.channels:
            marks |= set(self.tool_marks.texts)
        return self.reads(use) and bool(marks & self.specials)

    def reader(self, use: ToolUse, prompt: str | None, *, drop_specials: bool) -> Reader:
        """A reader of one answer to this prompt.

        drop_specials  the text has special tokens; those that are no marks are not told.
        """
        reader: Reader = Plain()
        if use.tools or self.channels:
            reader = self.tools.read(self.tool_marks, use.known)
        if self.reasoning is not None:
            begun = prompt is not None and self.reasoning.is_begun(prompt)
            reader = ThinkingReader(self.reasoning, self.thinking_marks, reader, begun=begun)
        return DropMarks(self.dropped, reader) if drop_specials else reader

    def num_reasoning(
        self, use: ToolUse, prompt: str | None, token_ids: Sequence[int], *, special: bool
    ) -> int:
        """How many of an answer's tokens are thinking, its marks with them."""
        if self.reasoning is None and not self.channels:
            return 0
        reader = self.reader(use, prompt, drop_specials=special)
        detokenizer = make_detokenizer(self.tokenizer, skip_special_tokens=not special)
        count = 0
        for token_id in token_ids:
            before = reader.is_thinking
            reader.feed(detokenizer.feed((token_id,)))
            count += before or reader.is_thinking
        return count

    def shape(
        self, use: ToolUse, asked: StructuredOutputs | None, prompt: str
    ) -> StructuredOutputs | None:
        """What binds the answer: the calls that must come, else what was asked for."""
        if use.bound or (asked is not None and use.tools):
            answer = None if use.mode != "auto" else self._answer_schema(asked)
            lark = calls_lark(self.tools, use, self.one_token_ids, answer=answer)
            thinking = None if self.channels else self._thinking(prompt)
            return StructuredOutputs(grammar=lark, thinking=thinking, param="tools")
        if asked is None:
            return None
        return msgspec.structs.replace(asked, thinking=self._thinking(prompt))

    def _answer_schema(self, asked: StructuredOutputs | None) -> dict[str, object] | None:
        """The schema of an answer that may be calls instead."""
        if asked is None:
            return None
        if asked.kind not in ("json", "json_object") or not self.tools.beside_json:
            raise RequestError(
                f"{asked.param} and tools, of which the model may choose, cannot be served "
                f"together here ({asked.kind}, calls as {self.tools.name}).",
                param=asked.param,
                code="unsupported",
                mend="tool_choice none or required",
            )
        if asked.json is None:
            return {"type": "object"}
        try:
            schema = json.loads(str(asked.json))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{asked.param}: {error}.", param=asked.param) from error
        if not isinstance(schema, dict):
            raise RequestError(f"{asked.param}: a schema is an object.", param=asked.param)
        return schema

    def _thinking(self, prompt: str) -> Thinking | None:
        if self.channels:
            return _HARMONY_THINKING
        if self.reasoning is None or prompt.rstrip().endswith(self.reasoning.end):
            return None  # the prompt has ended the thinking: it is switched off
        return self.reasoning.thinking(prompt)


class DropMarks:
    """Leaves special tokens out that are no marks of the answer's own."""

    def __init__(self, marks: Marks, inner: Reader) -> None:
        self._scanner = Scanner(marks)
        self._inner = inner

    @property
    def is_thinking(self) -> bool:
        """Whether the next text is thinking."""
        return self._inner.is_thinking

    def feed(self, text: str) -> list[Piece]:
        """What the text adds."""
        parts = self._scanner.feed(text)
        return joined([p for part, is_mark in parts if not is_mark for p in self._inner.feed(part)])

    def flush(self) -> list[Piece]:
        """The end of the answer."""
        held = [p for part, _ in self._scanner.flush() for p in self._inner.feed(part)]
        return joined([*held, *self._inner.flush()])
