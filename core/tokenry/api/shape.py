"""Fields that bind an answer to a shape: OpenAI's response_format, vLLM's structured_outputs and
its older guided_ fields.

In: fields of a request. Out: `StructuredOutputs` or None. At most one of them may ask for
something; a wrong one is a 400 that names it. Whether a schema or grammar is one, the engine says.
"""

from __future__ import annotations

from typing import Any

import msgspec

from tokenry.api.sampling import SamplingExtras
from tokenry.errors import RequestError
from tokenry.structured import StructuredOutputs


class ShapeFields(SamplingExtras, frozen=True, kw_only=True):
    """None asks for nothing."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None


_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


SHAPES = ("response_format", *_GUIDED, "guided_whitespace_pattern")
"""Names of these fields beside structured_outputs."""


def shape_of(request: ShapeFields) -> StructuredOutputs | None:
    """What the fields ask for. Raises RequestError."""
    found: list[StructuredOutputs] = []
    if request.response_format is not None:
        shape = _response_format(request.response_format)
        found += [] if shape is None else [shape]
    if request.structured_outputs is not None:
        found.append(_structured(request.structured_outputs))
    for name, kind in _GUIDED.items():
        value = getattr(request, name)
        if value is not None:
            pattern = request.guided_whitespace_pattern if kind == "json" else None
            given: dict[str, Any] = {kind: tuple(value) if kind == "choice" else value}
            found.append(StructuredOutputs(param=name, whitespace_pattern=pattern, **given))
    if request.guided_whitespace_pattern is not None and request.guided_json is None:
        raise RequestError(
            "guided_whitespace_pattern needs guided_json.", param="guided_whitespace_pattern"
        )
    if len(found) > 1:
        raise RequestError(
            f"{found[0].param} and {found[1].param} exclude each other.", param=found[1].param
        )
    return found[0] if found else None


def _response_format(value: dict[str, Any]) -> StructuredOutputs | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputs(json_object=True, param="response_format")
    if kind == "json_schema":
        given = value.get("json_schema")
        if not isinstance(given, dict):
            raise RequestError(
                "response_format.json_schema is missing.", param="response_format.json_schema"
            )
        schema = given.get("schema")
        if not isinstance(schema, dict):
            raise RequestError(
                "response_format.json_schema.schema must be an object.",
                param="response_format.json_schema.schema",
            )
        return StructuredOutputs(json=schema, param="response_format")
    raise RequestError(
        f"response_format.type is {kind!r}; it must be text, json_object or json_schema.",
        param="response_format.type",
        mend="structured_outputs has regex, choice and grammar",
    )


def _structured(value: dict[str, Any]) -> StructuredOutputs:
    known = {"json", "json_object", "regex", "choice", "grammar"}
    known |= {"whitespace_pattern", "disable_any_whitespace"}
    given = {name: item for name, item in value.items() if item is not None}
    unknown = sorted(set(given) - known)
    if unknown:
        raise RequestError(
            f"structured_outputs.{unknown[0]} cannot be served; known: {', '.join(sorted(known))}.",
            param=f"structured_outputs.{unknown[0]}",
        )
    try:
        return msgspec.convert(given, StructuredOutputs)
    except msgspec.ValidationError as error:
        raise RequestError(f"structured_outputs: {error}.", param="structured_outputs") from error
