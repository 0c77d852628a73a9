"""Where requests wait for their grammar before they may wait for anything else.

In: requests that bind their answer. Out: the same with a matcher, or the error that their grammar
is; nobody waits for another's. Grammars are compiled elsewhere (see `Grammars`), while steps go on.
Knows no scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from tokenry.errors import RequestError
from tokenry.messages import AddRequest
from tokenry.plan import Mask
from tokenry.structured import StructuredOutputs


class Matcher(Protocol):
    """How far one request is in its grammar."""

    def mask(self) -> Mask:
        """What may be drawn next."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take a drawn token in; whether the answer is complete and nothing can follow."""
        ...


class Compiling(Protocol):
    """A grammar on its way."""

    def done(self) -> bool:
        """Whether `matcher` answers at once."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Until it is done, at most so long."""
        ...

    def matcher(self) -> Matcher:
        """A matcher of its own. Raises RequestError if the grammar is none."""
        ...


class Grammars(Protocol):
    """What the engine needs of a compiler."""

    def start(self, wanted: StructuredOutputs) -> Compiling:
        """Begin to compile; returns at once."""
        ...

    def close(self) -> None:
        """Give up what is being compiled."""
        ...


@dataclass(frozen=True, slots=True)
class Passed:
    """A request whose grammar was compiled: its matcher, or why it has none."""

    message: AddRequest
    matcher: Matcher | RequestError


class Gate:
    """Owned by EngineCore."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._waiting: dict[str, tuple[AddRequest, Compiling]] = {}

    def __len__(self) -> int:
        """Requests that wait here."""
        return len(self._waiting)

    def add(self, message: AddRequest) -> None:
        """Begin to compile the request's grammar. Raises RequestError if nothing can."""
        wanted = message.params.structured_outputs
        assert wanted is not None
        if self._grammars is None:
            raise RequestError(
                f"{wanted.param}: this engine has no grammar compiler.",
                param=wanted.param,
                code="unsupported",
            )
        if message.request_id in self._waiting:
            raise RequestError(f"Request id {message.request_id!r} is in use.", param="request_id")
        self._waiting[message.request_id] = (message, self._grammars.start(wanted))

    def abort(self, request_ids: Iterable[str]) -> int:
        """Forget these; how many of them waited here."""
        return sum(self._waiting.pop(i, None) is not None for i in request_ids)

    def take(self) -> list[Passed]:
        """Those whose grammar is done, in the order in which they came."""
        done = [(m, compiling) for m, compiling in self._waiting.values() if compiling.done()]
        passed = []
        for message, compiling in done:
            del self._waiting[message.request_id]
            try:
                passed.append(Passed(message, compiling.matcher()))
            except RequestError as error:
                passed.append(Passed(message, error))
        return passed

    def wait(self, timeout_s: float) -> None:
        """Until the first of them may be done, at most so long."""
        if self._waiting:
            next(iter(self._waiting.values()))[1].wait(timeout_s)

    def close(self) -> None:
        """Forget everybody and end the compiler."""
        self._waiting.clear()
        if self._grammars is not None:
            self._grammars.close()
