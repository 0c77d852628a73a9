"""The queue of requests that hold no blocks: new ones and preempted ones, the smallest key first.

In: requests, by key; those that end while they wait. Out: who is next. Knows nothing of blocks and
steps. One that leaves from the middle stays in the heap until it is at the head, or until those
like it are the greater part: then they are all let go, so leaving costs constant time, amortised.
"""

from __future__ import annotations

import heapq

from tokenry.engine.request import Request, Status

_FEW = 16
"""So many that have left may stay, however few wait."""


class WaitingQueue:
    """Owned by Scheduler, who sets the status of its requests."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, ...], Request]] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return self._num_waiting

    @property
    def num_kept(self) -> int:
        """Requests that are held in memory here, with those that have left."""
        return len(self._heap)

    def push(self, request: Request) -> None:
        """Take in a request whose status is WAITING."""
        heapq.heappush(self._heap, (request.key, request))
        self._num_waiting += 1

    def head(self) -> Request | None:
        """Who is next; it stays."""
        while self._heap and self._heap[0][1].status is not Status.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Take out the head, which is being admitted."""
        heapq.heappop(self._heap)
        self._num_waiting -= 1

    def note_left(self) -> None:
        """A request has ended where it waited: its status says so."""
        self._num_waiting -= 1
        if len(self._heap) > 2 * self._num_waiting + _FEW:
            self._heap = [entry for entry in self._heap if entry[1].status is Status.WAITING]
            heapq.heapify(self._heap)
