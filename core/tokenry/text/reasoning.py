"""Thinking apart from answer: which marks a model sets around its thinking, and reading by them.

In: the chat template's text, the prompt's end, an answer in pieces. Out: the format, and pieces of
reasoning and of what comes after it. Chosen by what the template says, unless the server was told.
Knows no tool calls.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenry.errors import ConfigError
from tokenry.structured import Thinking
from tokenry.text.tools_scan import (
    AnswerOnly,
    Content,
    Marks,
    Piece,
    Reader,
    Reasoning,
    Scanner,
    Trimmed,
    joined,
)


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Marks around thinking; `dropped` are marks of the answer that are not text."""

    name: str
    begin: str
    end: str
    dropped: tuple[str, ...] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        """All of them."""
        return (self.begin, self.end, *self.dropped)

    def is_begun(self, prompt: str) -> bool:
        """Whether the prompt's end has opened the thinking already."""
        return prompt.rstrip().endswith(self.begin)

    def thinking(self, prompt: str) -> Thinking:
        """What a grammar must let come first."""
        return Thinking(begin=None if self.is_begun(prompt) else self.begin, end=self.end)


FORMATS = (
    ReasoningFormat("think", "<think>", "</think>"),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
    ReasoningFormat("thought", "<thought>", "</thought>"),
    ReasoningFormat("kimi", "◁think▷", "◁/think▷"),
    ReasoningFormat("gemma", "<|channel>thought\n", "<channel|>"),
    ReasoningFormat(
        "cohere",
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
)
"""By family; "think" is DeepSeek's, Qwen's and most others'."""
HARMONY = "harmony"
"""GPT-OSS: its channels are read with its tool calls, see tools_harmony.py."""
NAMES = ("auto", "none", HARMONY, *(f.name for f in FORMATS))


def choose_reasoning(wanted: str, template: str) -> ReasoningFormat | None:
    """The format of this name; by "auto", the one whose marks the template has. Raises
    ConfigError.
    """
    if wanted == "auto":
        return next((f for f in FORMATS if f.end in template or f.begin in template), None)
    if wanted in ("none", HARMONY):
        return None
    for known in FORMATS:
        if known.name == wanted:
            return known
    raise ConfigError(
        f"--reasoning-parser {wanted}: there is none of this name.", mend=", ".join(NAMES)
    )


class ThinkingReader:
    """Thinking first, if there is any; what follows goes to the reader of the answer.

    begun  the prompt has opened the thinking.
    """

    def __init__(
        self, wanted: ReasoningFormat, marks: Marks, answer: Reader, *, begun: bool
    ) -> None:
        self._format = wanted
        self._scanner = Scanner(marks)
        self._answer = answer
        self._mode = "thinking" if begun else "lead"
        self._lead = ""
        self._thought = Trimmed()
        self._told = Trimmed()

    @property
    def is_thinking(self) -> bool:
        """Whether the next text is thinking, as far as is known."""
        return self._mode == "thinking"

    def feed(self, text: str) -> list[Piece]:
        """What the text adds."""
        return self._read(self._scanner.feed(text))

    def flush(self) -> list[Piece]:
        """The end of the answer."""
        pieces = self._read(self._scanner.flush())
        if self._mode == "lead":
            pieces += self._answer.feed(self._lead)
        return joined([*pieces, *self._answer.flush()])

    def _read(self, parts: list[tuple[str, bool]]) -> list[Piece]:
        pieces: list[Piece] = []
        for text, is_mark in parts:
            if is_mark and text == self._format.begin and self._mode in ("lead", "thinking"):
                self._mode, self._lead = "thinking", ""
            elif is_mark and text == self._format.end and self._mode != "answer":
                pieces += self._answer_text(self._lead)
                self._mode, self._lead = "after", ""
            elif is_mark and text in self._format.dropped:
                continue
            elif self._mode == "thinking":
                pieces.append(Reasoning(self._thought.feed(text)))
            else:
                pieces += self._plain(text)
        return joined(pieces)

    def _plain(self, text: str) -> list[Piece]:
        """Before any thinking, or behind it, where the first blanks are not told."""
        if self._mode == "lead":
            self._lead += text
            if not self._lead.strip():
                return []
            text, self._lead, self._mode = self._lead, "", "answer"
        elif self._mode == "after":
            text = text.lstrip()
            if not text:
                return []
            self._mode = "answer"
        return self._answer_text(text)

    def _answer_text(self, text: str) -> list[Piece]:
        return self._answer.feed(text) if text else []


class Plain(AnswerOnly):
    """Reads nothing: all text is content."""

    def feed(self, text: str) -> list[Piece]:
        """The text."""
        return [Content(text)] if text else []

    def flush(self) -> list[Piece]:
        """Nothing is held."""
        return []
