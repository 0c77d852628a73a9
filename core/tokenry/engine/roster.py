"""Where every request is: in the queue, held back for another's prompt, in the running list, ended.

In: what the scheduler decides. Out: the lists, with the blocks that come and go with a request's
place. Owned by Scheduler; knows nothing of steps.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

from tokenry.engine.beam_group import BeamGroup
from tokenry.engine.block_manager import BlockManager
from tokenry.engine.integrity import check_books
from tokenry.engine.limits import Counters
from tokenry.engine.policy import Queue
from tokenry.engine.request import Request, Status


class Roster:
    """Owned by Scheduler.

    running   in the order of their keys.   held: by the request whose prompt they wait for.
    groups    beam searches, by the ids under which they are told.
    forget    ids that the runner is to forget with the next plan.
    """

    def __init__(
        self,
        blocks: BlockManager,
        counters: Counters,
        waiting: Queue,
        clock: Callable[[], float],
    ) -> None:
        self._clock = clock
        self.blocks = blocks
        self.counters = counters
        self.requests: dict[str, Request] = {}
        self.waiting = waiting
        self.running: list[Request] = []
        self.held: dict[str, list[Request]] = {}
        self.groups: dict[str, BeamGroup] = {}
        self.forget: list[str] = []

    def __contains__(self, request_id: str) -> bool:
        """Whether the id is in use."""
        return request_id in self.requests or request_id in self.groups

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, and those that wait for another's prompt."""
        return len(self.waiting) + sum(map(len, self.held.values()))

    def check(self) -> None:
        """Blocks and requests agree. Raises IntegrityError or AssertionError."""
        check_books(self.blocks, self.requests.values(), self.running, self.num_waiting)

    def kv_waste(self) -> float:
        """Share of the slots in held blocks that no token uses (blocks held by several count
        once).
        """
        size = self.blocks.block_size
        unused = sum(len(r.block_ids) * size - r.num_computed for r in self.running)
        return unused / max(1, self.blocks.num_held * size)

    def reset_prefix_cache(self) -> None:
        """Nothing is found any more; running requests keep their blocks."""
        self.blocks.reset_prefix_cache()
        for request in self.running:
            request.block_hashes = []

    def queue(self, request: Request) -> None:
        """It waits for its turn."""
        request.status = Status.WAITING
        self.waiting.push(request)

    def admit(
        self, request: Request, prefix: list[int], hashes: list[bytes], num_cached: int
    ) -> None:
        """The head of the queue runs, with these blocks of others to begin with."""
        self.waiting.pop()
        self.blocks.hold(prefix)
        request.block_ids = list(prefix)
        request.block_hashes = hashes
        request.num_computed = request.num_done = num_cached
        request.introduce = False
        request.source = None
        request.status = Status.RUNNING
        bisect.insort(self.running, request, key=lambda r: r.key)
        if not request.scheduled_s:
            request.scheduled_s = self._clock()
            request.num_cached = min(num_cached, request.num_prompt)
            self.counters.prefix_queries += len(request.tokens)
            self.counters.prefix_hits += num_cached

    def preempt(self, request: Request) -> None:
        """Back to the queue without its blocks; its tokens (one of them perhaps in flight) stay."""
        if request.group is not None and request.group.idle(request):
            self.end(request)  # what it was to give is here: only its blocks were kept
            return
        self.counters.preemptions += 1
        self._drop_blocks(request)
        self.release(request)
        request.num_computed = request.num_done = 0
        request.epoch += 1
        if request.scores_prompt:
            request.prompt_logprobs.clear()
        self.queue(request)

    def end(self, request: Request) -> None:
        """It holds nothing any more, wherever it was; nobody is told."""
        held = self.held.get(request.source.request_id, []) if request.source else []
        waited = request.status is Status.WAITING
        if not waited:
            self._drop_blocks(request)
        request.status = Status.ENDED
        if request in held:
            held.remove(request)
        elif waited:
            self.waiting.note_left()
        self.release(request)
        del self.requests[request.request_id]

    def _drop_blocks(self, request: Request) -> None:
        self.running.remove(request)
        self.blocks.release(request.block_ids)
        request.block_ids = []
        request.block_hashes = []
        self.forget.append(request.request_id)

    def release(self, source: Request) -> None:
        """Who waited for this request's prompt waits no more: it is computed, or never will be."""
        for request in self.held.pop(source.request_id, ()):
            self.queue(request)

    def end_group(self, group: BeamGroup) -> None:
        """All that is left of a beam search."""
        for member in group.members:
            if member.status is not Status.ENDED:
                self.end(member)
        for beam_id in group.ids:
            del self.groups[beam_id]

    def end_idle_beam(self) -> bool:
        """Make room, where only beams hold it that have done their part; whether there was one."""
        for request in reversed(self.running):
            if request.group is not None and request.group.idle(request):
                self.end(request)
                return True
        return False
