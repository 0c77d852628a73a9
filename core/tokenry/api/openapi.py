"""GET /openapi.json: the routes and what they take, from the same list and structs that serve them.

In: the endpoints. Out: an OpenAPI 3.1 document. Fields beyond the structs are allowed where the
server ignores and names them; a field of the document is one that means something.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import tokenry
from tokenry.api.absent import ABSENT
from tokenry.api.dialects import Dialect, dialect_of
from tokenry.api.routes import Endpoint, get
from tokenry.api.wire import JSON

_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_MANY = {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}, "minItems": 1}
_INPUT = {"anyOf": [_TEXT, _IDS, _MANY]}
_CHAT_ROLES = ["system", "developer", "user", "assistant", "tool", "function"]


def _messages(roles: list[str]) -> dict[str, Any]:
    part = {"type": "object", "properties": {"type": _TEXT, "text": _TEXT}, "required": ["type"]}
    content = {"anyOf": [_TEXT, {"type": "array", "items": part}, {"type": "null"}]}
    message = {
        "type": "object",
        "properties": {"role": {"type": "string", "enum": roles}, "content": content},
        "required": ["role"],
    }
    return {"type": "array", "items": message, "minItems": 1}


_FINER: dict[tuple[str, str], dict[str, Any]] = {
    ("ChatRequest", "messages"): _messages(_CHAT_ROLES),
    ("MessagesRequest", "messages"): _messages(["user", "assistant"]),
    ("CompletionRequest", "prompt"): _INPUT,
    ("EmbeddingRequest", "input"): _INPUT,
    ("PoolingRequest", "input"): _INPUT,
    ("ClassifyRequest", "input"): _INPUT,
}
"""Schemas of fields that the structs leave open, because their errors are told by hand."""

_OPENAI_ERROR = {
    "type": "object",
    "required": ["message", "type", "param", "code"],
    "properties": {
        "message": _TEXT,
        "type": _TEXT,
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    },
}
_ERRORS: dict[Dialect, dict[str, Any]] = {
    "openai": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": _OPENAI_ERROR},
    },
    "cohere": {
        "type": "object",
        "required": ["message", "error"],
        "properties": {"message": _TEXT, "error": _OPENAI_ERROR},
    },
    "anthropic": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": _TEXT, "message": _TEXT},
            },
        },
    },
    "tgi": {
        "type": "object",
        "required": ["error", "error_type"],
        "properties": {"error": _TEXT, "error_type": _TEXT},
    },
}


def endpoint(others: Iterable[Endpoint]) -> Endpoint:
    """The route; its document is made once, when it is first asked for."""
    listed = list(others)
    made: list[dict[str, Any]] = []

    async def openapi(request: Request) -> Response:
        if not made:
            made.append(document(listed))
        return JSON(made[0])

    return get("/openapi.json", openapi, "This document.")


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The OpenAPI document."""
    listed = list(endpoints)
    types = sorted(
        {e.body for e in listed if isinstance(e.body, type)}, key=lambda kind: kind.__name__
    )
    refs, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    for (name, field), schema in _FINER.items():
        if name in components:
            components[name]["properties"][field] = schema
    for dialect, schema in _ERRORS.items():
        components[f"{dialect}_error"] = schema
    bodies = dict(zip(types, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for one in listed:
        path = re.sub(r":\w+}", "}", one.path)
        paths.setdefault(path, {})[one.verb.lower()] = _operation(one, path, bodies)
    return {
        "openapi": "3.1.0",
        "info": {"title": "tokenry", "version": tokenry.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
    }


def _operation(one: Endpoint, path: str, bodies: dict[type[Any], Any]) -> dict[str, Any]:
    dialect = dialect_of(one.verb, path)
    error = {"$ref": f"#/components/schemas/{dialect}_error"}
    failed = {
        "description": "what was wrong, and its mend",
        "content": {"application/json": {"schema": error}},
    }
    if path in ("/readyz", "/health"):
        failed = {"description": "not ready, and why", "content": {"application/json": {}}}
    operation: dict[str, Any] = {
        "summary": one.about,
        "operationId": re.sub(r"\W+", "_", f"{one.verb.lower()}{path}").strip("_"),
        "responses": {"4XX": failed, "5XX": failed},
    }
    if path not in ABSENT:
        kinds: dict[str, Any] = {one.kind: {}}
        if one.verb == "POST" and isinstance(one.body, type) and _streams(one.body):
            kinds["text/event-stream"] = {}
        operation["responses"]["200"] = {"description": one.about, "content": kinds}
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": _TEXT}
        for name in re.findall(r"{(\w+)}", path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": of_query}
        for name, of_query in (one.query or {}).items()
    ]
    if parameters:
        operation["parameters"] = parameters
    schema = bodies.get(one.body) if isinstance(one.body, type) else one.body
    if one.form is not None:
        form = {"type": "object", "properties": one.form, "required": sorted(one.form)}
        operation["requestBody"] = {
            "required": True,
            "content": {"multipart/form-data": {"schema": form}},
        }
    elif schema is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _streams(body: type[Any]) -> bool:
    return "stream" in getattr(body, "__struct_fields__", ())
