"""Whether the books agree: the scheduler's lists, its requests and the blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenry.engine.block_manager import BlockManager
from tokenry.engine.request import Request, Status


def check_books(
    blocks: BlockManager, requests: Collection[Request], running: Sequence[Request], waiting: int
) -> None:
    """Raises IntegrityError or AssertionError. `waiting`: how many requests hold no blocks."""
    blocks.check_integrity(r.block_ids for r in running)
    for request in requests:
        assert 0 <= request.num_computed <= request.num_tokens, request
        assert request.num_done <= request.num_computed, request
        is_running = request in running
        assert is_running == (request.status is Status.RUNNING), request
        assert is_running or not request.block_ids, request
        held = len(request.block_ids) * blocks.block_size
        assert not blocks.num_blocks or held >= request.num_computed, request
    keys = [r.key for r in running]
    assert keys == sorted(keys), keys
    assert waiting + len(running) == len(requests)
    _check_partial(blocks, running)


def _check_partial(blocks: BlockManager, running: Sequence[Request]) -> None:
    """A block that is not full, or is yet to be written, belongs to one request alone."""
    owners: dict[int, Request] = {}
    for request in running:
        for block_id in request.block_ids[request.num_done // blocks.block_size :]:
            assert block_id not in owners, (block_id, request, owners[block_id])
            owners[block_id] = request
    for request in running:
        for block_id in request.block_ids[: request.num_done // blocks.block_size]:
            assert block_id not in owners, (block_id, request, owners[block_id])
