"""What clients leave here belongs to the key that made it: to any other it is not there.

In: objects that carry their owner's mark, beside the fields of the API. Out: those that the caller
may see, without the mark. A mark is the digest of a key's text, so a key with a new text is another
owner; objects that were made while no key was asked for have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokenry.api.caller import caller

OWNER = "owner"
"""Name of the mark, in memory and on disk; no field of OpenAI's."""


def may_see(kept: Mapping[str, Any]) -> bool:
    """Whether the request that is answered here may know of it."""
    return caller().sees(kept.get(OWNER))


def visible(kept: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that the request may know of, as it is shown them."""
    return [shown(one) for one in kept if may_see(one)]


def shown(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The API's object."""
    return {name: value for name, value in kept.items() if name != OWNER}
