"""GroupedCache: a CacheManager for models whose layers keep different things, such as windows of the context.

Owns one block table of a request for each group of layers that keep the same (`cache_specs.py`). Invariant: a group
holds the blocks that the request's next token reads and, but for what is in the middle of a step, no others: what has
left a window is given back while the request runs, and NO_BLOCK takes its place in the table.

A prefix can be used if all its blocks are there for the groups that see everything, and for each window those that the
token behind the prefix sees.
"""

from collections.abc import Sequence

from nanovllm.cache_specs import PagedKV
from nanovllm.engine.cache_manager import BlockTables, CacheManager, Find
from nanovllm.engine.request import Request

NO_BLOCK = -1


class GroupedCache(CacheManager):
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool,
        specs: Sequence[PagedKV],
        max_model_len: int,
        max_step_tokens: int,
    ) -> None:
        """specs: of each group. max_step_tokens: the most that a step computes of one request."""
        super().__init__(num_blocks, block_size, enable_prefix_caching)
        self.num_groups = len(specs)
        self._specs = specs
        self._table_width = self._num_blocks(max_model_len)
        self._max_step_tokens = max_step_tokens

    def longest(self, find: Find, num_blocks: int) -> BlockTables:
        found: BlockTables = [[] for _ in self._specs]
        in_a_row = [0] * self.num_groups  # blocks found up to here, without a gap
        length = 0
        for end in range(1, num_blocks + 1):
            for group, table in enumerate(found):
                block_id = find(group, end - 1)
                table.append(NO_BLOCK if block_id is None else block_id)
                in_a_row[group] = 0 if block_id is None else in_a_row[group] + 1
            if any(spec.window is None and not count for spec, count in zip(self._specs, in_a_row, strict=True)):
                break
            if all(count >= end - first for first, count in zip(self._first_blocks(end), in_a_row, strict=True)):
                length = end
        firsts = self._first_blocks(length)
        return [[NO_BLOCK] * first + table[first:length] for first, table in zip(firsts, found, strict=True)]

    def _first_blocks(self, num_blocks: int) -> list[int]:
        """For each group, the first block that the token behind so many blocks reads."""
        return [spec.first_block(num_blocks * self.block_size, self.block_size) for spec in self._specs]

    def held(self, request: Request) -> Find:
        def find(group: int, index: int) -> int | None:
            block_id = request.block_ids[group][index]
            return None if block_id == NO_BLOCK else block_id

        return find

    def has_room(self, request: Request, prefix: BlockTables) -> bool:
        taken = [block_id for table in prefix for block_id in _real(table)]
        num_needed = sum(
            spec.num_blocks(request.num_tokens, self._max_step_tokens, self.block_size) for spec in self._specs
        )
        return num_needed - len(taken) <= self.pool.num_free_blocks - self.pool.num_free_among(taken)

    def enter(self, request: Request, prefix: BlockTables) -> None:
        """Groups with a window get their blocks step by step, as others leave it."""
        for table in prefix:
            self.pool.acquire(_real(table))
        self._begin(request, prefix)
        for spec, table in zip(self._specs, prefix, strict=True):
            if spec.window is None:
                added = self.pool.allocate(self._num_blocks(request.num_tokens) - len(table))
                assert added is not None, "has_room was asked"
                table.extend(added)

    def allocate(self, request: Request, num_new_tokens: int) -> list[tuple[int, int]] | None:
        """As of any CacheManager, once what has left a window is given back."""
        num_blocks = self._num_blocks(request.num_computed_tokens + num_new_tokens)
        tables = request.block_ids
        missing = [(group, index) for group, table in enumerate(tables) for index in range(len(table), num_blocks)]
        if not missing:
            return []
        self._leave_windows(request)
        block_ids = self.pool.allocate(len(missing))
        if block_ids is None:
            return None
        for (group, _), block_id in zip(missing, block_ids, strict=True):
            tables[group].append(block_id)
        return [(self._place(*place), block_id) for place, block_id in zip(missing, block_ids, strict=True)]

    def _leave_windows(self, request: Request) -> None:
        """Give back what no token from here on reads. Steps run in order, so what is in flight has read it before."""
        for spec, table in zip(self._specs, request.block_ids, strict=True):
            start = end = min(spec.first_block(request.num_computed_tokens, self.block_size), len(table))
            while start and table[start - 1] != NO_BLOCK:
                start -= 1
            self.pool.release(table[start:end])
            table[start:end] = [NO_BLOCK] * (end - start)

    def _place(self, group: int, index: int) -> int:
        """A row's tables lie side by side."""
        return group * self._table_width + index

    def tables(self, request: Request) -> tuple[list[int], list[tuple[int, int]]]:
        first, *others = request.block_ids
        added = [
            (self._place(group, index), block_id)
            for group, table in enumerate(others, 1)
            for index, block_id in enumerate(table)
            if block_id != NO_BLOCK
        ]
        return [max(block_id, 0) for block_id in first], added  # where there is none, nothing is read

    def _give_back(self, block_ids: list[int]) -> None:
        self.pool.release(_real(block_ids))

    def _key(self, block_hash: bytes, group: int) -> bytes:
        """Of the same tokens, each group keeps the keys and values of its own layers."""
        return block_hash + bytes([group])


def _real(table: list[int]) -> list[int]:
    return [block_id for block_id in table if block_id != NO_BLOCK]
