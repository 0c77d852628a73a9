"""Logits processors of others: found by entry point, made per request, never trusted.

In: a name and its arguments. Out: a function on one row of logits. What foreign code raises is its
request's error, never the batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import Tensor

from tokenry.backend.contract import IntArray
from tokenry.errors import RequestError
from tokenry.params import SamplingParams

LogitsProcessor = Callable[[IntArray, Tensor], Tensor]
"""(known tokens [n] int32, logits [vocab]) -> logits [vocab]."""
ProcessorFactory = Callable[[Mapping[str, Any]], LogitsProcessor]
PROCESSOR_GROUP = "tokenry.logits_processors"


def installed_processors() -> dict[str, ProcessorFactory]:
    """Factories of installed distributions (entry-point group `tokenry.logits_processors`), by
    name. Each is imported when a request asks for it: a broken one is that request's error.
    """
    return {entry.name: _when_used(entry) for entry in entry_points(group=PROCESSOR_GROUP)}


def _when_used(entry: EntryPoint) -> ProcessorFactory:
    def make(args: Mapping[str, Any]) -> LogitsProcessor:
        factory: ProcessorFactory = entry.load()
        return factory(args)

    return make


def make_processor(
    factories: Mapping[str, ProcessorFactory], params: SamplingParams
) -> LogitsProcessor:
    """The request's own processor, so that it may keep a state. Raises RequestError."""
    name = params.logits_processor or ""
    factory = factories.get(name)
    if factory is None:
        known = ", ".join(sorted(factories)) or "none"
        raise RequestError(
            f"There is no logits processor {name!r}; installed: {known}.",
            param="logits_processor",
        )
    try:
        return factory(params.extra_args or {})
    except Exception as error:  # foreign code, whatever it raises
        raise RequestError(raised(params, error), param="logits_processor") from error


def raised(params: SamplingParams, error: Exception) -> str:
    """What a request is told of its processor's exception."""
    return f"Logits processor {params.logits_processor!r}: {type(error).__name__}: {error}"
