"""CacheManager: the KV blocks of each request, and how much of a request the cache holds already.

Owns the requests' block tables, and which blocks may be found by others: anyone through the prefix cache, siblings
without one. References are `block_pool.py`'s; who runs is the scheduler's, which asks: how much is there (find_prefix),
would the rest fit (has_room); enter, allocate, publish, release. Invariants: a running request holds every block that
its next token reads; nobody finds a block that other weights have computed, since their name is in its hash.

Here all layers keep the keys and values of all tokens, so a request has one table. Where layers differ, it has one for
each group of them (`grouped_cache.py`).
"""

from collections.abc import Callable, Sequence

from nanovllm.engine.block_pool import BlockPool, hash_block
from nanovllm.engine.features.siblings import longest_held, prompt_hashes
from nanovllm.engine.features.weights_version import WeightsVersion, begin_with
from nanovllm.engine.request import Request

BlockTables = list[list[int]]  # of one request, for each group of layers
Find = Callable[[int, int], int | None]  # (group, index) -> the block with that part of a history, if there is one


class CacheManager:
    num_groups = 1

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks)
        self.weights = WeightsVersion()

    def clear(self) -> None:
        """Forget every table and all content."""
        self.pool = BlockPool(self.pool.num_blocks)

    # -- what a request finds --

    def find_prefix(self, request: Request) -> BlockTables:
        """Blocks of the request's longest prefix that is there.

        At least one token is left over to compute, for its logits, and all from which the log-probability of a prompt
        token is still to be computed. Without a prefix cache these are blocks of its prompt that a sibling holds.
        """
        if request.hash_root != (root := self.weights.root + request.cache_salt):
            begin_with(request, root, self.weights)
        nothing: BlockTables = [[] for _ in range(self.num_groups)]
        if request.capture is not None:
            return nothing  # the cache holds keys and values, no hidden states
        num_tokens = len(request.token_ids) - 1
        if request.scoring is not None:
            num_tokens = request.scoring.limit_prefix(request, num_tokens)
        last = num_tokens // self.block_size
        if self.enable_prefix_caching:
            hashes = self._hashes(request, last)
            return self.longest(lambda group, index: self.pool.find(self._key(hashes[index], group)), last)
        return longest_held(self, request, last) or nothing

    def num_tokens(self, prefix: BlockTables) -> int:
        return len(prefix[0]) * self.block_size

    def longest(self, find: Find, num_blocks: int) -> BlockTables:
        """Tables of the longest prefix, of at most num_blocks, that is there for every group."""
        table: list[int] = []
        for index in range(num_blocks):
            if (block_id := find(0, index)) is None:
                break
            table.append(block_id)
        return [table]

    def held(self, request: Request) -> Find:
        return lambda group, index: request.block_ids[group][index]

    # -- what a request holds --

    def has_room(self, request: Request, prefix: BlockTables) -> bool:
        """Could the request enter with this prefix, and all tokens that it has be computed?"""
        (table,) = prefix
        num_needed = self._num_blocks(request.num_tokens) - len(table)
        return num_needed <= self.pool.num_free_blocks - self.pool.num_free_among(table)

    def has_blocks(self, requests: Sequence[Request]) -> bool:
        """Are there blocks to extend every table of these requests by one?"""
        return len(requests) * self.num_groups <= self.pool.num_free_blocks

    def enter(self, request: Request, prefix: BlockTables) -> None:
        """Take the blocks of the prefix, and those for all other tokens that the request has."""
        (table,) = prefix
        self.pool.acquire(table)
        self._begin(request, prefix)
        added = self.pool.allocate(self._num_blocks(request.num_tokens) - len(table))
        assert added is not None, "has_room was asked"
        table.extend(added)

    def _begin(self, request: Request, prefix: BlockTables) -> None:
        request.block_ids = prefix
        request.num_published_blocks = len(prefix[0])
        request.num_computed_tokens = self.num_tokens(prefix)

    def allocate(self, request: Request, num_new_tokens: int) -> list[tuple[int, int]] | None:
        """Extend the tables to hold that many more computed tokens; None, and nothing changed, if there are too few.

        Returns each block added, as a plan has them: (place in the row's tables, block).
        """
        (table,) = request.block_ids
        num_needed = self._num_blocks(request.num_computed_tokens + num_new_tokens) - len(table)
        if num_needed <= 0:
            return []
        block_ids = self.pool.allocate(num_needed)
        if block_ids is None:
            return None
        table.extend(block_ids)
        return list(enumerate(block_ids, len(table) - num_needed))

    def tables(self, request: Request) -> tuple[list[int], list[tuple[int, int]]]:
        """The table of the first group, and the blocks of the others as from `allocate`."""
        return list(request.block_ids[0]), []

    def release(self, request: Request) -> None:
        """Give everything back; what is full stays to be found until its blocks are handed out again."""
        self.publish(request, request.num_computed_tokens)
        for table in request.block_ids:
            self._give_back(table)
        request.block_ids = []
        request.num_published_blocks = 0

    def _give_back(self, block_ids: list[int]) -> None:
        self.pool.release(block_ids)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- what others find --

    def publish(self, request: Request, num_computed_tokens: int) -> None:
        """Let others find the request's full blocks: anyone through the prefix cache, its siblings without one.

        A block may be found as soon as the step that fills it is planned: every layer stores the whole batch's keys and
        values before anyone in the batch reads them, and later steps run later.
        """
        num_full = min(num_computed_tokens, len(request.token_ids)) // self.block_size
        num_published = request.num_published_blocks
        if num_full <= num_published:
            return
        request.num_published_blocks = num_full
        if self.enable_prefix_caching:
            hashes = self._hashes(request, num_full)
            find = self.held(request)
            for group in range(self.num_groups):
                for index in range(num_published, num_full):
                    if (block_id := find(group, index)) is not None:
                        self.pool.publish(block_id, self._key(hashes[index], group))

    def _key(self, block_hash: bytes, group: int) -> bytes:
        return block_hash

    def _hashes(self, request: Request, num_blocks: int) -> Sequence[bytes]:
        """The request's first num_blocks (or more) block hashes; each block is hashed once in the request's life."""
        hashes = request.block_hashes
        if not hashes and request.siblings:
            hashes.extend(prompt_hashes(request, self.block_size))
        while len(hashes) < num_blocks:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else request.hash_root
            hashes.append(hash_block(parent, request.token_ids[start : start + self.block_size]))
        return hashes
