"""What the simulated device refuses, as types.

The library marks its refusals with a tag in front of the message; `typed` turns such a RuntimeError
into the class.
"""

from __future__ import annotations

import re


class NoDevice(RuntimeError):
    """This process has no simulated device."""


class Refused(RuntimeError):
    """The device or a vendor stand-in refuses what was asked."""


class HostSync(Refused):
    """The host waited for the device where it must not."""


class NewProgram(Refused):
    """A recipe, capture or program was made after strict()."""


class NotCapturable(Refused):
    """An operation that a graph capture or a compiled program can't hold."""


class DynamicShape(Refused):
    """A shape that is not a plain number reached a static-shape compiler."""


class VendorRefuses(Refused):
    """A stand-in refuses what the vendor's function refuses (or is never given by public code)."""


BY_TAG: dict[str, type[Refused]] = {
    "host-sync": HostSync,
    "new-program": NewProgram,
    "not-capturable": NotCapturable,
}
_TAG = re.compile(r"\[simdevice:([a-z-]+)\] ")


def typed(error: BaseException) -> Refused | None:
    """The typed refusal that `error` stands for, or None when it is something else."""
    if isinstance(error, Refused):
        return None
    text = str(error)
    found = _TAG.search(text)
    if not isinstance(error, RuntimeError) or found is None:
        return None
    return BY_TAG[found.group(1)](text[found.end() :])
