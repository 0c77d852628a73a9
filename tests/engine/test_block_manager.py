import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenry.engine.block_manager import BlockManager, IntegrityError, block_hash, root_hash

SIZE = 4


class Blocks(RuleBasedStateMachine):
    """Random holders; after every rule the books agree and a found prefix holds what it was entered
    for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(12, SIZE)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=20), salt=st.sampled_from(["", "x"])
    )
    def begin(self, tokens: list[int], salt: str) -> None:
        root = root_hash(salt, None)
        prefix, hashes = self.manager.find_prefix(root, tokens, len(tokens) // SIZE)
        for i, block_id in enumerate(prefix):
            want = (ord(salt or "-"), *tokens[: (i + 1) * SIZE])
            assert self.content[block_id] == want, (
                "found a block of other tokens or of another tenant"
            )
        room = self.manager.num_takable_after(prefix)
        self.manager.hold(prefix)
        fresh = self.manager.allocate(self.manager.num_blocks_for(len(tokens)) - len(prefix))
        if fresh is None:
            assert room < self.manager.num_blocks_for(len(tokens)) - len(prefix)
            self.manager.release(prefix)
            return
        block_ids = [*prefix, *fresh]
        for block_id in fresh:
            self.content.pop(block_id, None)
        parent = hashes[-1] if hashes else root
        for i in range(len(prefix), len(tokens) // SIZE):
            parent = block_hash(parent, tokens[i * SIZE : (i + 1) * SIZE])
            self.content[block_ids[i]] = (ord(salt or "-"), *tokens[: (i + 1) * SIZE])
            self.manager.enter(block_ids[i], parent)
        self.held.append(block_ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.held) - 1))
        self.manager.release(self.held.pop(at))

    @rule()
    def reset(self) -> None:
        self.manager.reset_prefix_cache()
        assert self.manager.find_prefix(root_hash("", None), [0] * SIZE, 1) == ([], [])

    @invariant()
    def books_agree(self) -> None:
        self.manager.check_integrity(self.held)


Blocks.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestBlocks = Blocks.TestCase


def test_blocks_cached_longest_ago_are_taken_first():
    manager = BlockManager(4, SIZE)
    digests = [block_hash(root_hash("", None), [i] * SIZE) for i in range(3)]
    blocks = [manager.allocate(1) for _ in digests]
    for block, digest in zip(blocks, digests, strict=True):
        manager.enter(block[0], digest)
    for block in (blocks[1], blocks[0], blocks[2]):
        manager.release(block)
    assert manager.allocate(1) == blocks[1]


def test_the_beginning_of_a_prompt_outlives_its_end():
    manager = BlockManager(4, SIZE)
    tokens = list(range(3 * SIZE))
    block_ids = manager.allocate(3)
    parent = root_hash("", None)
    for i, block_id in enumerate(block_ids):
        parent = block_hash(parent, tokens[i * SIZE : (i + 1) * SIZE])
        manager.enter(block_id, parent)
    manager.release(block_ids)
    manager.allocate(1)
    found, _ = manager.find_prefix(root_hash("", None), tokens, 3)
    assert found == list(block_ids[:2])


@pytest.mark.parametrize(
    "other",
    [root_hash("salt", None), root_hash("", "adapter"), root_hash("", None, [b"image"])],
    ids=["salt", "lora", "multimodal"],
)
def test_whatever_changes_the_kv_changes_the_hash(other):
    assert block_hash(other, [1, 2]) != block_hash(root_hash("", None), [1, 2])


def test_a_block_held_by_nobody_known_is_reported_with_both_sides():
    manager = BlockManager(4, SIZE)
    manager.allocate(2)
    with pytest.raises(IntegrityError, match=r"1: \(0, 1\)"):
        manager.check_integrity([[2]])
