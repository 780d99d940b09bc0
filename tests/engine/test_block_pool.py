"""BlockPool by itself: references, order of reuse, and what can be found."""

import pytest

from nanovllm.engine.block_pool import BlockPool, hash_block


def found(pool: BlockPool, *block_hashes: bytes) -> list[int]:
    blocks = (pool.find(block_hash) for block_hash in block_hashes)
    return [block_id for block_id in blocks if block_id is not None]


def test_all_or_nothing() -> None:
    pool = BlockPool(4)
    assert pool.allocate(5) is None
    assert pool.num_free_blocks == 4
    blocks = pool.allocate(4)
    assert blocks is not None and sorted(blocks) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_a_shared_block_is_free_only_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks[0], b"x")
    pool.acquire(found(pool, b"x"))
    pool.release(blocks)
    assert pool.num_free_blocks == 1
    pool.release(blocks)
    assert pool.num_free_blocks == 2
    with pytest.raises(AssertionError):
        pool.release(blocks)


def test_cached_blocks_are_reused_last_and_oldest_first() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    assert blocks is not None
    for block_id, name in zip(blocks, (b"a", b"b", b"c"), strict=False):
        pool.publish(block_id, name)
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[3]], "what caches nothing goes first"
    assert pool.allocate(1) == [blocks[2]], "then the end of the history"
    assert found(pool, b"a", b"b", b"c") == blocks[:2]


def test_what_caches_nothing_is_handed_out_before_what_does() -> None:
    pool = BlockPool(3)
    cached, other = pool.allocate(1), pool.allocate(1)
    assert cached is not None and other is not None
    pool.publish(cached[0], b"a")
    pool.release(cached)
    pool.release(other)
    assert pool.allocate(2) == [other[0], 2]
    assert found(pool, b"a") == cached


def test_a_block_keeps_the_hash_that_it_was_published_with() -> None:
    pool = BlockPool(2)
    pool.publish(0, b"a")
    pool.publish(0, b"b")
    assert found(pool, b"b") == []
    assert found(pool, b"a") == [0]


def test_a_cache_that_was_emptied_fills_again() -> None:
    pool = BlockPool(1)
    pool.publish(0, b"a")
    pool.forget_cached()
    pool.publish(0, b"b")
    assert found(pool, b"b") == [0]
    assert pool.allocate(1) == [0]
    assert found(pool, b"b") == []


def test_of_equal_blocks_the_first_is_found() -> None:
    pool = BlockPool(2)
    pool.publish(0, b"a")
    pool.publish(1, b"a")
    assert found(pool, b"a") == [0]
    pool.forget_cached()
    assert found(pool, b"a") == []


def test_a_hash_covers_the_whole_history() -> None:
    one = hash_block(b"", [1, 2])
    assert one == hash_block(b"", (1, 2))
    assert len(one) == 16, "128 bits: a collision is out of reach"
    assert len({one, hash_block(b"", [2, 1]), hash_block(b"salt", [1, 2]), hash_block(one, [1, 2])}) == 4
    assert hash_block(b"", [1 << 32]) != hash_block(b"", [0])
