"""Which of a request's blocks are shared by their content.

In: a request and the block manager. Out: the cached blocks that its tokens begin with; its own full
blocks, entered for others. A block's name is the chained hash of all tokens up to its end, of the
LoRA and of the salt (see block_manager.root_hash).
"""

from __future__ import annotations

from tokenry.engine.block_manager import BlockManager, block_hash, root_hash
from tokenry.engine.request import Request, Status


def find_prefix(
    blocks: BlockManager, request: Request, *, pools_whole: bool = False
) -> tuple[list[int], list[bytes]]:
    """Blocks with the KV of its first tokens and their hashes, from the cache or from its source,
    whichever has more; none for a request that scores its prompt or pools over all
    of it, for then every token must be computed, as the last token always must.
    """
    if request.scores_prompt or (pools_whole and request.pooling is not None):
        return [], []
    root = root_hash(request.cache_salt, request.lora_name)
    most = (len(request.tokens) - 1) // blocks.block_size
    found = blocks.find_prefix(root, request.tokens, most)
    source = request.source
    if source is not None and source.status is Status.RUNNING:
        shared = min(most, min(request.num_shared, source.num_done) // blocks.block_size)
        if shared > len(found[0]):
            return blocks.fork(source.block_ids, shared), source.block_hashes[:shared]
    return found


def shares_prompt(request: Request, source: Request) -> bool:
    """Whether the source's blocks hold what the request's prompt needs: the same tokens, of the
    same tenant and LoRA, and no scores wanted that only computing gives.
    """
    return (
        source.tokens[: source.num_prompt] == request.tokens
        and (source.cache_salt, source.lora_name) == (request.cache_salt, request.lora_name)
        and request.params.prompt_logprobs is None
        and request.pooling is None
    )


def enter_blocks(blocks: BlockManager, request: Request, num_computed: int) -> None:
    """Enter the request's full blocks, of which the first num_computed tokens are computed."""
    size = blocks.block_size
    hashes = request.block_hashes
    if not blocks.prefix_caching or num_computed // size <= len(hashes):
        return
    parent = hashes[-1] if hashes else root_hash(request.cache_salt, request.lora_name)
    for i in range(len(hashes), num_computed // size):
        parent = block_hash(parent, request.tokens[i * size : (i + 1) * size])
        hashes.append(parent)
        blocks.enter(request.block_ids[i], parent)
