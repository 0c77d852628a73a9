"""Prompts that ask for the middle of a text, for models that were trained to fill it in.

In: what stands before and after. Out: token ids with the model's own marks, or None where it has
none. The marks are those of the model families' reports (StarCoder arXiv 2305.06161, Code Llama
2308.12950, DeepSeek-Coder 2401.14196, Qwen2.5-Coder 2409.12186, CodeGemma, Codestral's tokenizer).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenry.text.tokenizer import Tokenizer

_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
"""Before the prefix, before the suffix, before the middle."""
_SUFFIX_FIRST = ("[SUFFIX]", "[PREFIX]")
"""Before the suffix, before the prefix; the middle follows at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Infill:
    """A model's marks: [before the prefix, before the suffix, before the middle] as ids; two where
    the suffix comes first.
    """

    marks: tuple[int, ...]

    @staticmethod
    def of(tokenizer: Tokenizer) -> Infill | None:
        """The model's marks, None if it cannot fill in."""
        for names in (*_MARKS, _SUFFIX_FIRST):
            found = (tokenizer.core.token_to_id(name) for name in names)
            ids = tuple(i for i in found if i is not None)
            if len(ids) == len(names):
                return Infill(marks=ids)
        return None

    def prompt(
        self, prefix: Sequence[int], suffix: Sequence[int], begin: Sequence[int] = ()
    ) -> list[int]:
        """The prompt; `begin` are the special tokens that a prompt begins with."""
        if len(self.marks) == 2:
            return [*begin, self.marks[0], *suffix, self.marks[1], *prefix]
        before, hole, middle = self.marks
        return [*begin, before, *prefix, hole, *suffix, middle]
