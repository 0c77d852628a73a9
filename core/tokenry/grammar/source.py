"""From what a request asks for to llguidance's own grammar text.

In: StructuredOutputs; ids of the tokenizer's special tokens. Out: the text that llguidance compiles
(JSON with one or several grammars in its Lark dialect). Compiles nothing itself, but reads EBNF.
Source of the dialect: llguidance, docs/syntax.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from tokenry.errors import RequestError
from tokenry.structured import WHITESPACE, StructuredOutputs, Thinking

_ANCHORED_END = re.compile(r"(?<!\\)(\\\\)*\$$")


def grammar_of(wanted: StructuredOutputs, special_ids: Mapping[str, int]) -> str:
    """The grammar as llguidance takes it. Raises RequestError where the text is none at sight."""
    try:
        body = _body(wanted)
    except RecursionError as error:
        raise wrong(wanted, "it is nested too deeply") from error
    except (ValueError, GbnfToLarkError) as error:
        raise wrong(wanted, str(error)) from error
    if wanted.thinking is None:
        return json.dumps({"grammars": [body]})
    lark = thinking_lark(wanted.thinking, special_ids)
    return json.dumps({"grammars": [{"name": "main", "lark_grammar": lark}, body]})


def wrong(wanted: StructuredOutputs, why: str) -> RequestError:
    """The error that names the request's field."""
    what = {"json": "JSON schema", "regex": "regular expression"}.get(wanted.kind, wanted.kind)
    text = why.strip()[:600].rstrip(".")
    return RequestError(
        f"{wanted.param}: this {what} cannot be served: {text}.",
        param=wanted.param,
        code="invalid_grammar",
    )


def _body(wanted: StructuredOutputs) -> dict[str, Any]:
    """The bound part as one of llguidance's grammars."""
    if wanted.json is not None or wanted.json_object:
        return {"name": "body", "json_schema": _schema(wanted)}
    if wanted.regex is not None:
        lark = f"start: /{regex_to_lark(_unanchored(wanted.regex), use_ascii='d')}/"
    elif wanted.choice is not None:
        lark = "start: CHOICE\nCHOICE: " + " | ".join(
            quoted(text) for text in dict.fromkeys(wanted.choice)
        )
    else:
        lark = any_to_lark(wanted.grammar or "")
    return {"name": "body", "lark_grammar": lark}


def _schema(wanted: StructuredOutputs) -> dict[str, Any]:
    """The schema, with how its whitespace is written."""
    schema = {"type": "object"} if wanted.json is None else json.loads(str(wanted.json))
    if not isinstance(schema, dict):
        raise ValueError(f"a schema is an object, this is {json.dumps(schema)[:40]}")
    guide = schema.get("x-guidance", {})
    if not isinstance(guide, dict):
        raise ValueError("x-guidance must be an object")
    if wanted.disable_any_whitespace:
        return {**schema, "x-guidance": {**guide, "whitespace_flexible": False}}
    pattern = wanted.whitespace_pattern
    if pattern is None and {"whitespace_pattern", "whitespace_flexible"} & set(guide):
        return schema
    return {**schema, "x-guidance": {**guide, "whitespace_pattern": pattern or WHITESPACE}}


def _unanchored(regex: str) -> str:
    """The whole answer matches anyway; anchors are not in the dialect."""
    regex = regex.removeprefix("^")
    return regex[:-1] if _ANCHORED_END.search(regex) else regex


def thinking_lark(thinking: Thinking, special_ids: Mapping[str, int]) -> str:
    """`start`: free text to its end, then the grammar named `body`."""
    end = literal(thinking.end, special_ids)
    rules = ["GAP: /[ \\n]{1,4}/", "TEXT: /(.|\\n)*/"]
    if end.startswith("<["):
        rules.append(f"thought: TEXT {end}")
    else:
        rules.append(f"thought[lazy]: /(.|\\n)*/ {end}")
    if thinking.begin is None:
        rules.append("start: thought GAP? @body")
    else:
        begin = literal(thinking.begin, special_ids)
        if thinking.skipped:
            skipped = literal(thinking.skipped, special_ids)
            rules.append(f"start: ({begin} thought | {skipped}) GAP? @body")
        else:
            rules.append(f"start: GAP? ({begin} thought GAP?)? @body")
    return "\n".join(rules)


def literal(text: str, special_ids: Mapping[str, int]) -> str:
    """The text in Lark; a special token is named by its id, as it is not made of characters."""
    marks = sorted(special_ids, key=len, reverse=True)
    cut = "|".join(re.escape(mark) for mark in marks) or "(?!)"
    parts = [part for part in re.split(f"({cut})", text) if part]
    return " ".join(f"<[{special_ids[p]}]>" if p in special_ids else quoted(p) for p in parts)


def quoted(text: str) -> str:
    """A Lark string: JSON's escapes mean the same there."""
    return json.dumps(text, ensure_ascii=False)
