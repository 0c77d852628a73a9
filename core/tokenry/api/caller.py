"""Who sent the request that is being answered: known to all that runs for it, asked by few.

In: set by the gate in middleware.py, once per HTTP request. Out: `caller()`. A context variable, so
that a route need not hand it on; a task that a request starts inherits its sender.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass, field

import msgspec
from starlette.datastructures import Headers

from tokenry.api.keys import Key, Targets
from tokenry.api.limits import Account
from tokenry.errors import RequestError
from tokenry.params import SamplingParams

_HEADERS = {
    "ttft_ms": "x-slo-ttft-ms",
    "tpot_ms": "x-slo-tpot-ms",
    "deadline_ms": "x-slo-deadline-ms",
}
_PARAMS = {"ttft_ms": "ttft_target_ms", "tpot_ms": "tpot_target_ms", "deadline_ms": "deadline_ms"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """One HTTP request's sender.

    request_id   the answer's x-request-id.
    traceparent  W3C trace context that came with it, "" for none.
    account      of its key; None where no key is asked for.
    targets      from its headers, else from its key.
    on_behalf_of   whose batch the line is that is answered here; no client sent it.
    filler       it is such a line: its requests run on what live ones leave.
    """

    request_id: str = ""
    traceparent: str = ""
    account: Account | None = None
    targets: Targets = field(default_factory=Targets)
    on_behalf_of: str | None = None
    filler: bool = False

    @property
    def owner(self) -> str | None:
        """Whose is what it leaves here: its key's digest; None where no key is asked for."""
        return self.on_behalf_of if self.key is None else self.key.sha256

    def sees(self, owner: str | None) -> bool:
        """Whether it may know of what this owner left here: its own; everything where no key is
        asked for, or with an admin's key.
        """
        sees_all = self.owner is None or (self.key is not None and self.key.admin)
        return sees_all or owner == self.owner

    @property
    def key(self) -> Key | None:
        """Its key."""
        return None if self.account is None else self.account.key

    def priority(self, asked: int) -> int:
        """What it gets; raises RequestError for one that its key does not allow."""
        base = None if self.key is None else self.key.priority
        if base is None:
            return asked
        if asked < 0:
            raise RequestError(
                f"priority is {asked}; requests of this key may only ask to wait longer, so it "
                "must be at least 0.",
                param="priority",
            )
        return base + asked

    def with_targets(self, params: SamplingParams) -> SamplingParams:
        """The params, with the sender's targets where they have none of their own."""
        ours = {theirs: getattr(self.targets, name) for name, theirs in _PARAMS.items()}
        missing = {
            name: value
            for name, value in ours.items()
            if value is not None and getattr(params, name) is None
        }
        return msgspec.structs.replace(params, **missing) if missing else params


NOBODY = Caller()
CALLER: ContextVar[Caller] = ContextVar("caller", default=NOBODY)


def caller() -> Caller:
    """The sender of the request that is being answered here."""
    return CALLER.get()


def targets_of(headers: Headers, key: Key | None) -> Targets:
    """Targets from the request's headers, else from the key. Raises RequestError that names the
    header.
    """
    values: dict[str, float | None] = {}
    for name, header in _HEADERS.items():
        text = headers.get(header)
        values[name] = None if key is None else getattr(key, name)
        if text is not None:
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not 0 < value < math.inf:
                raise RequestError(
                    f"The header {header} is {text!r}, it must be milliseconds above 0.",
                    param=header,
                )
            values[name] = value
    return Targets(**values)
