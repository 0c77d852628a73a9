"""How models write their calls: one entry per format, chosen by what the chat template says.

In: a chat template's text, or a name. Out: a `ToolFormat`: its marks, its reader, and the texts
around a call's name and arguments, of which a grammar is made. A new format is one entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenry.errors import ConfigError
from tokenry.text.tools_harmony import HARMONY_MARKS, Harmony
from tokenry.text.tools_marked import DeepSeek, Mistral
from tokenry.text.tools_parsers import LeadingJson, TaggedJson
from tokenry.text.tools_python import Pythonic
from tokenry.text.tools_scan import Marks, Reader
from tokenry.text.tools_xml import XML_MARKS, XmlCalls

Known = Mapping[str, Mapping[str, Any]]
"""Functions that may be called, and the schemas of their parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One way to write calls.

    marks        texts that are no content; some are special tokens of the tokenizer.
    read         makes a reader, of the marks and the functions.
    before, after        texts around all calls of an answer.
    head, tail           around one call's arguments; NAME in the head is the function's.
    between              calls; None: there is one call only.
    begins       how an answer with calls is told from one without: by its first mark, wherever it
                 comes; by its first character; by its channel.
    arguments    how they are written: a JSON object, Python's keywords, a tag each.
    id_length    characters of a call's id.
    """

    name: str
    marks: tuple[str, ...]
    read: Callable[[Marks, Known], Reader]
    before: str = ""
    head: str
    tail: str
    between: str | None = "\n"
    after: str = ""
    begins: Literal["mark", "character", "channel"] = "mark"
    arguments: Literal["json", "python", "tags"] = "json"
    id_length: int = 24

    @property
    def beside_json(self) -> bool:
        """Whether a JSON answer can be told from a call by its first character."""
        return self.begins != "character" or self.arguments == "python"


def _llama(marks: Marks, known: Known) -> Reader:
    return LeadingJson(frozenset(known), ("<|python_tag|>", ""))


def _json(marks: Marks, known: Known) -> Reader:
    return LeadingJson(frozenset(known), ("```json", "```tool_call", "```tool_code", "```", ""))


def _mistral(marks: Marks, known: Known) -> Reader:
    return Mistral(marks, frozenset(known))


def _deepseek(marks: Marks, known: Known) -> Reader:
    return DeepSeek(marks, frozenset(known))


_DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
_MISTRAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

FORMATS = (
    ToolFormat(
        name="hermes",
        marks=("<tool_call>", "</tool_call>"),
        read=lambda marks, known: TaggedJson(marks, "<tool_call>"),
        head='<tool_call>\n{"name": "NAME", "arguments": ',
        tail="}\n</tool_call>",
    ),
    ToolFormat(
        name="qwen3_coder",
        marks=XML_MARKS,
        read=XmlCalls,
        head="<tool_call>\n<function=NAME>\n",
        tail="</function>\n</tool_call>",
        arguments="tags",
    ),
    ToolFormat(
        name="llama3_json",
        marks=("<|python_tag|>",),
        read=_llama,
        head='{"name": "NAME", "parameters": ',
        tail="}",
        between="; ",
        begins="character",
    ),
    ToolFormat(
        name="pythonic",
        marks=("<|python_start|>", "<|python_end|>"),
        read=lambda marks, known: Pythonic(marks),
        before="[",
        head="NAME(",
        tail=")",
        between=", ",
        after="]",
        begins="character",
        arguments="python",
    ),
    ToolFormat(
        name="mistral",
        marks=_MISTRAL,
        read=_mistral,
        before="[TOOL_CALLS] [",
        head='{"name": "NAME", "arguments": ',
        tail="}",
        between=", ",
        after="]",
        id_length=9,
    ),
    ToolFormat(
        name="mistral_v11",
        marks=_MISTRAL,
        read=_mistral,
        head="[TOOL_CALLS]NAME[ARGS]",
        tail="",
        between="",
        id_length=9,
    ),
    ToolFormat(
        name="deepseek_v3",
        marks=_DEEPSEEK,
        read=_deepseek,
        before="<｜tool▁calls▁begin｜>",
        head="<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        tail="\n```<｜tool▁call▁end｜>",
        after="<｜tool▁calls▁end｜>",
    ),
    ToolFormat(
        name="deepseek_v31",
        marks=_DEEPSEEK,
        read=_deepseek,
        before="<｜tool▁calls▁begin｜>",
        head="<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
        tail="<｜tool▁call▁end｜>",
        between="",
        after="<｜tool▁calls▁end｜>",
    ),
    ToolFormat(
        name="harmony",
        marks=HARMONY_MARKS,
        read=lambda marks, known: Harmony(marks),
        head="<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
        tail="",
        between=None,
        begins="channel",
    ),
    ToolFormat(
        name="json",
        marks=(),
        read=_json,
        head='{"name": "NAME", "parameters": ',
        tail="}",
        begins="character",
    ),
)
_BY_NAME = {known.name: known for known in FORMATS} | {"gemma": FORMATS[-1]}
NAMES = ("auto", *_BY_NAME)


def choose_format(wanted: str, template: str) -> ToolFormat:
    """The format of this name; by "auto", the one that the template writes: "json" where it knows
    of no tools, as Gemma's. Raises ConfigError.
    """
    if wanted != "auto":
        if wanted not in _BY_NAME:
            raise ConfigError(
                f"--tool-parser {wanted}: there is none of this name.", mend=", ".join(NAMES)
            )
        return _BY_NAME[wanted]
    return _BY_NAME[_guess(template)]


def _guess(template: str) -> str:
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"
    if "<｜tool▁calls▁begin｜>" in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    if "[TOOL_CALLS]" in template:
        return "mistral_v11" if "[ARGS]" in template else "mistral"
    if "<tool_call>" in template and "<function=" in template:
        return "qwen3_coder"
    if "<tool_call>" in template:
        return "hermes"
    if "<|python_start|>" in template or "func_name1(" in template:
        return "pythonic"
    if "<|python_tag|>" in template or "<|eom_id|>" in template:
        return "llama3_json"
    return "json"
