"""What shape an answer must have: a JSON schema, a regular expression, one of several texts, or a
grammar.

In: what a request asks for, from Python or decoded JSON. Out: a frozen, checked struct that crosses
to the engine beside the sampling parameters. Knows no tokenizer and compiles nothing: whether a
schema or grammar is a right one is said by `grammar/`, in the engine's process.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from tokenry.errors import RequestError

MAX_JSON_BYTES = 512 * 1024
MAX_REGEX_BYTES = 16 * 1024
MAX_GRAMMAR_BYTES = 512 * 1024
MAX_CHOICES = 4096
MAX_CHOICE_BYTES = 256 * 1024
WHITESPACE = r"[ \t]{1,2}|\r?\n( {0,32}|\t{0,8})"
"""Between JSON's tokens, unless a request says otherwise."""
KINDS = ("json", "json_object", "regex", "choice", "grammar")


def is_one_token(added_token: str, special: bool) -> bool:
    """Whether a grammar takes this added token as one that is not made of characters: special ones,
    and whatever stands in angle brackets (`<think>`), as llguidance reads a tokenizer.json.
    """
    return special or (added_token.startswith("<") and added_token.endswith(">"))


class Thinking(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Free text that may come before the bound part of the answer.

    begin  text that opens it; the model may leave all of it out. None: the prompt has opened it
           already, so it must come to its end.
    end    text that closes it.
    skipped   text in the place of all that, where the model leaves it out.
    """

    begin: str | None = None
    end: str
    skipped: str = ""


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly one of json, json_object, regex, choice, grammar; names as vLLM's
    StructuredOutputsParams.

    json                 a JSON schema, as an object or as its text.
    json_object          any JSON object.
    regex                a regular expression for the whole answer, in Rust's dialect: no
                         look-around, no back references, its digits are 0 to 9.
    choice               the answer is one of these texts.
    grammar              Lark in llguidance's dialect, or EBNF/GBNF (rules with `::=`, from `root`).
    whitespace_pattern   regular expression of the whitespace between JSON's tokens; without it up
                         to two blanks, or one line break and its indentation: a model cannot lose
                         itself in them.
    disable_any_whitespace   no whitespace between JSON's tokens.
    thinking             text that may come first (a reasoning model's).
    param                the request's field that errors are to name.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    thinking: Thinking | None = None
    param: str = "structured_outputs"

    def __post_init__(self) -> None:
        kinds = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(kinds) != 1:
            what = "none of them" if not kinds else " and ".join(kinds)
            text = f"{self.param} must have exactly one of {', '.join(KINDS)}; it has {what}."
            raise RequestError(text, param=self.param)
        if self.json is not None:
            msgspec.structs.force_setattr(self, "json", self._json_text(self.json))
        if self.choice is not None:
            msgspec.structs.force_setattr(self, "choice", self._checked_choice(self.choice))
        for name, most in (
            ("regex", MAX_REGEX_BYTES),
            ("whitespace_pattern", MAX_REGEX_BYTES),
            ("grammar", MAX_GRAMMAR_BYTES),
        ):
            value = getattr(self, name)
            if value is not None:
                self._check_text(name, value, most)
        if not (self.json or self.json_object):
            for name in ("whitespace_pattern", "disable_any_whitespace"):
                if getattr(self, name):
                    raise self._wrong(f"{name} is for json and json_object only")

    @property
    def kind(self) -> str:
        """Which of the five it is."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))

    def _json_text(self, value: object) -> str:
        """The schema as JSON text; whether it is a schema, the compiler says."""
        if isinstance(value, dict):
            try:
                value = json.dumps(value, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise self._wrong(f"the schema cannot be written as JSON: {what}") from error
        self._check_text("json", value, MAX_JSON_BYTES)
        assert isinstance(value, str)
        return value

    def _checked_choice(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not value:
            raise self._wrong("choice must be a list of at least one text")
        for text in value:
            self._check_text("choice", text, MAX_CHOICE_BYTES)
        total = sum(len(text) for text in value)
        if len(value) > MAX_CHOICES or total > MAX_CHOICE_BYTES:
            raise self._wrong(
                f"choice has {len(value)} texts with {total} characters; at most {MAX_CHOICES} "
                f"with {MAX_CHOICE_BYTES} are taken"
            )
        return tuple(value)

    def _check_text(self, name: str, value: object, most: int) -> None:
        if not isinstance(value, str):
            raise self._wrong(f"{name} must be a text, got a {type(value).__name__}")
        if not value:
            raise self._wrong(f"{name} is empty")
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:
            raise self._wrong(f"{name} is not valid Unicode: {error}") from error
        if size > most:
            raise self._wrong(f"{name} has {size} bytes, at most {most} are taken")

    def _wrong(self, what: str) -> RequestError:
        return RequestError(f"{self.param}: {what}.", param=self.param)


def structured_outputs(value: object) -> StructuredOutputs:
    """From a dict of its fields, or as it is. Raises RequestError."""
    if isinstance(value, StructuredOutputs):
        return value
    if not isinstance(value, dict):
        raise RequestError(
            f"structured_outputs must be a StructuredOutputs or a dict, got {value!r}.",
            param="structured_outputs",
        )
    known = set(StructuredOutputs.__struct_fields__)
    unknown = sorted(str(name) for name in value if name not in known)
    if unknown:
        text = f"structured_outputs has no field {unknown[0]!r}."
        raise RequestError(text, param=f"structured_outputs.{unknown[0]}")
    try:
        return msgspec.convert(value, StructuredOutputs)
    except msgspec.ValidationError as error:
        text = f"structured_outputs: {error}."
        raise RequestError(text, param="structured_outputs") from error
