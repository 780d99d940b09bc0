"""BlockPool: who holds which KV block, and which full blocks can be found again by their content.

Owns block ids, reference counts and the prefix cache; it never touches a tensor and knows no request. Invariant: a
block is in `_free` exactly when nobody references it; a free block keeps its content, and can be found, until it is
handed out again, oldest first.

A full block's hash covers its tokens and the hash of the block before it, so equal hashes mean equal histories. The
hash is 128 bits of BLAKE2b, so that a collision (a wrong answer) is out of reach even for prompts chosen to cause one.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """16-byte hash of a full block, chained to the one before it (for the first block, to the request's salt)."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self.num_shared = 0  # references to blocks beyond each one's first
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds this content, if one does. Takes no reference."""
        return self._block_of_hash.get(block_hash)

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        return sum(self._references[block_id] == 0 for block_id in block_ids)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Reference blocks that `find` returned, shared with whoever holds them."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                del self._free[block_id]
            else:
                self.num_shared += 1
            self._references[block_id] += 1

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Hand out blocks nobody references, forgetting what they cached; None, and no change, if there are too few."""
        if num_blocks > len(self._free):
            return None
        block_ids = []
        for _ in range(num_blocks):
            block_id, _ = self._free.popitem(last=False)
            block_hash = self._hashes[block_id]
            if block_hash is not None:
                del self._block_of_hash[block_hash]
                self._hashes[block_id] = None
            self._references[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Let a full block be found. Of two blocks with the same content the first one stays the one that is found."""
        if self._hashes[block_id] is None and block_hash not in self._block_of_hash:
            self._hashes[block_id] = block_hash
            self._block_of_hash[block_hash] = block_id

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference each. The end of a history is reused before its beginning, which others can share."""
        for block_id in reversed(block_ids):
            self._references[block_id] -= 1
            assert self._references[block_id] >= 0, f"block {block_id} was released twice"
            if self._references[block_id] > 0:
                self.num_shared -= 1
            else:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def forget_cached(self) -> None:
        """Empty the prefix cache; blocks in use stay with their holders."""
        for block_id in self._block_of_hash.values():
            self._hashes[block_id] = None
        self._block_of_hash.clear()
