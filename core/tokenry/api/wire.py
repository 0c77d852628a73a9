"""Bytes on the wire: JSON by msgspec, in requests and in answers.

In: a request's body. Out: typed structs, or a `RequestError` whose `param` is OpenAI's path of the
field at fault.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

from tokenry.errors import RequestError

T = TypeVar("T")
_AT = re.compile(r" - at `(?:key` in `)?\$?(.*)`$")


class JSON(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Non-finite numbers never come here: `clamp` is in the way."""
        return msgspec.json.encode(content)


def parse(body: bytes) -> dict[str, Any]:
    """The body's object; 400 for anything else."""
    try:
        data = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise RequestError("The body's JSON is nested too deeply.") from error
    if not isinstance(data, dict):
        raise RequestError("The body must be a JSON object.")
    return data


def convert(data: dict[str, Any], kind: type[T]) -> T:
    """The struct; a wrong type is named by its path (`messages[0].role`)."""
    try:
        return msgspec.convert(data, kind, strict=True, str_keys=True)
    except msgspec.ValidationError as error:
        text = str(error)
        at = _AT.search(text)
        missing = re.search(r"missing required field `(\w+)`", text)
        param = at[1].lstrip(".").replace("[...]", "") if at else None
        if missing:
            param = f"{param}.{missing[1]}" if param else missing[1]
        what = _AT.sub("", text)
        raise RequestError(f"{param or 'The body'}: {what}.", param=param or None) from error


def clamp(logprob: float) -> float:
    """A log-probability that JSON can hold: -inf and NaN are not JSON."""
    return logprob if logprob > -9999.0 else -9999.0
