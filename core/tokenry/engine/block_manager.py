"""Which request holds which KV block, and which blocks still hold the KV of a known token sequence.

In: counts and token ids. Out: block ids. Owns reference counts, block hashes and the free list;
knows nothing of
requests, tensors or time. Block 0 is the null block and never handed out.

A block is in one of three states: held (reference count > 0), cached (count 0, but its hash is
known: it can be found
again until it is taken for something else, oldest first), or free. Only full blocks whose KV was
really computed are
entered in the cache, under a hash chained over all tokens before them (as vLLM's automatic prefix
caching does).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from tokenry.errors import TokenryError

NULL_BLOCK = 0


class IntegrityError(TokenryError):
    """The books of the block manager do not agree; the text shows both sides."""


def root_hash(cache_salt: str, lora_name: str | None, extra: Iterable[bytes] = ()) -> bytes:
    """Start of a hash chain: everything besides the tokens that changes a request's KV."""
    h = hashlib.blake2b(digest_size=16)
    for part in (
        cache_salt.encode(),
        b"" if lora_name is None else b"lora:" + lora_name.encode(),
        *extra,
    ):
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash of a full block: 128 bits of BLAKE2b over the parent's hash and the token ids."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockManager:
    """Owned by Scheduler."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # in the order in which they will be taken: free ones first, then cached ones, oldest first
        self._unheld: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_usable(self) -> int:
        """Blocks that requests can hold in all."""
        return max(0, self.num_blocks - 1)

    @property
    def num_held(self) -> int:
        """Blocks that some request holds."""
        return self.num_usable - len(self._unheld)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens need; none where there is no KV."""
        return 0 if self.num_blocks == 0 else -(-num_tokens // self.block_size)

    def find_prefix(
        self, root: bytes, tokens: Sequence[int], max_blocks: int
    ) -> tuple[list[int], list[bytes]]:
        """The cached blocks (at most max_blocks) with which these tokens begin, and their hashes.
        Takes nothing.
        """
        block_ids: list[int] = []
        hashes: list[bytes] = []
        if not self.prefix_caching:
            return block_ids, hashes
        parent = root
        for i in range(max_blocks):
            parent = block_hash(parent, tokens[i * self.block_size : (i + 1) * self.block_size])
            block_id = self._block_of.get(parent)
            if block_id is None:
                break
            block_ids.append(block_id)
            hashes.append(parent)
        return block_ids, hashes

    def fork(self, block_ids: Sequence[int], count: int) -> list[int]:
        """The first `count` blocks of a request, for another that begins with the same tokens and
        is to hold them, too. Full blocks only: they are never written again, so the tokens after
        them are written to blocks of one's own (copy on write, by computing them once more).
        """
        assert count <= len(block_ids), (count, block_ids)
        assert all(self._references[b] for b in block_ids[:count]), "a fork shares what is held"
        return list(block_ids[:count])

    def num_takable_after(self, prefix: Sequence[int]) -> int:
        """Blocks that could be handed out once `prefix` is held."""
        return len(self._unheld) - sum(1 for b in prefix if self._references[b] == 0)

    def hold(self, block_ids: Sequence[int]) -> None:
        """One more reference to each (found by find_prefix)."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                del self._unheld[block_id]
            self._references[block_id] += 1

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """So many blocks with one reference each, or None (and nothing taken). Forgets what they
        cached.
        """
        if count > len(self._unheld):
            return None
        block_ids = []
        for _ in range(count):
            block_id, _none = self._unheld.popitem(last=False)
            old = self._hash_of.pop(block_id, None)
            if old is not None:
                del self._block_of[old]
            self._references[block_id] = 1
            block_ids.append(block_id)
        return tuple(block_ids)

    def release(self, block_ids: Sequence[int]) -> None:
        """One reference less to each. Last blocks first, so that the beginnings of prompts stay
        longest.
        """
        for block_id in reversed(block_ids):
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._unheld[block_id] = None
                if block_id not in self._hash_of:
                    self._unheld.move_to_end(block_id, last=False)

    def enter(self, block_id: int, digest: bytes) -> None:
        """The held block now has the computed KV of `digest`'s tokens. The first block to have it
        is the one found.
        """
        if self.prefix_caching and digest not in self._block_of and block_id not in self._hash_of:
            self._block_of[digest] = block_id
            self._hash_of[block_id] = digest

    def reset_prefix_cache(self) -> None:
        """Nothing is found any more; held blocks stay held."""
        self._hash_of.clear()
        self._block_of.clear()

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """The books agree with what the requests say they hold. Raises IntegrityError."""
        counted: Counter[int] = Counter()
        for block_ids in held:
            counted.update(block_ids)
        booked = {b: n for b, n in enumerate(self._references) if n}
        if dict(counted) != booked:
            wrong = {b: (counted[b], booked.get(b, 0)) for b in counted.keys() | booked.keys()}
            wrong = {b: pair for b, pair in wrong.items() if pair[0] != pair[1]}
            raise IntegrityError(f"block: (held by requests, reference count) differ: {wrong}")
        unheld = {b for b in range(1, self.num_blocks) if not self._references[b]}
        if unheld != self._unheld.keys():
            raise IntegrityError(
                f"unheld blocks: by reference count {sorted(unheld)}, "
                f"in the list {sorted(self._unheld)}"
            )
        if {h: b for b, h in self._hash_of.items()} != self._block_of:
            raise IntegrityError(
                f"hashes {self._hash_of} and their inverse {self._block_of} differ"
            )
        if NULL_BLOCK in counted or NULL_BLOCK in self._hash_of:
            raise IntegrityError("the null block is held or cached")
