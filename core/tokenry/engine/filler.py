"""Fillers: requests that run on what the others leave, such as a batch's lines.

In: who runs, and what one that waits is short of. Out: who gives up its place, or nobody. Whatever
the policy, a filler comes after all others in the queue and in every order of the running ones, so
it is also the first to be preempted when one of them grows. Owns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenry.engine.request import Request

LATE = 1 << 60
"""Added to a filler's urgency: more than any priority is worth."""


def num_urgent(order: Sequence[Request]) -> int:
    """How many go before the first filler, where the fillers are last."""
    return sum(not request.filler for request in order)


def who_yields(
    running: Sequence[Request],
    request: Request,
    num_missing: int,
    num_blocks_for: Callable[[int], int],
) -> Request | None:
    """The last filler, if `request` is none and all of them together free what it is short of. No
    filler may have a row in the step that is being planned yet: its blocks would be in use.

    num_missing  blocks that the request is short of, those included that are kept for requests
                 whose prompts are not computed yet; 0: only a place is missing.
    """
    if request.filler:
        return None
    fillers = [one for one in running if one.filler]
    freed = sum(max(len(one.block_ids), num_blocks_for(len(one.tokens))) for one in fillers)
    return fillers[-1] if fillers and freed >= num_missing else None
