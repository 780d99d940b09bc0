"""TieredCache: a CacheManager with a tier below: what is evicted goes down, and what is found there comes back.

Owns what moves between the KV cache and the tiers below it, host memory (`host_slots.py`) and a folder (`store.py`);
workers move it (`mover.py`) before the step of the plan it was decided in. Invariant: a block is written in a plan by a
move or by the step, never by both, and moves out of the cache come before those into it; so every block that is found
holds what its hash says once the step begins.

In the table that `find_prefix` returns, a block that lies below stands as BELOW; `enter` puts a real one in its place.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

from nanovllm.engine.block_pool import BlockPool
from nanovllm.engine.cache_manager import BlockTables, CacheManager
from nanovllm.engine.interfaces import Executor, PendingStep
from nanovllm.engine.request import Request
from nanovllm.engine.scheduler_output import BlockMoves, SchedulerOutput
from nanovllm.tiers.host_slots import HostSlots
from nanovllm.tiers.store import PrefixStore

BELOW = -1


class TieredPool(BlockPool):
    """evict: told each block whose content is about to be forgotten. is_below: asked for what is not here. forget:
    called when all is to be forgotten.
    """

    def __init__(
        self,
        num_blocks: int,
        evict: Callable[[int, bytes], None],
        is_below: Callable[[bytes], bool],
        forget: Callable[[], None],
    ) -> None:
        super().__init__(num_blocks)
        self._evict, self._is_below, self._forget = evict, is_below, forget

    def find(self, block_hash: bytes) -> int | None:
        found = super().find(block_hash)
        return BELOW if found is None and self._is_below(block_hash) else found

    def forget_cached(self) -> None:
        super().forget_cached()
        self._forget()

    def allocate(self, num_blocks: int) -> list[int] | None:
        if num_blocks <= len(self._free):
            for block_id in islice(self._free, num_blocks):
                block_hash = self._hashes[block_id]
                if block_hash is not None:
                    self._evict(block_id, block_hash)
        return super().allocate(num_blocks)


class TieredCache(CacheManager):
    def __init__(self, num_blocks: int, block_size: int, host: HostSlots | None, store: PrefixStore | None) -> None:
        super().__init__(num_blocks, block_size, enable_prefix_caching=True)
        self._host, self._store = host, store
        self.counts = {"num_blocks_saved": 0, "num_blocks_from_host": 0, "num_blocks_from_store": 0}
        self.clear()

    def clear(self) -> None:
        """Also of the host's memory: a step that was interrupted may not have filled it."""
        self.pool = TieredPool(self.pool.num_blocks, self._evict, self._is_below, self._forget)
        self._moves = BlockMoves()
        self.is_looking = False  # into the store, for the request at the head of the queue
        self._forget()

    def _forget(self) -> None:
        # Blocks to keep, with their hashes: of plans before the newest, and of the newest, whose step may fill them.
        self._found: list[tuple[int, bytes]] = []
        self._found_now: list[tuple[int, bytes]] = []
        if self._host is not None:
            self._host.clear()

    def take_moves(self) -> BlockMoves | None:
        """Those of the plan that has been made."""
        moves, self._moves = self._moves, BlockMoves()
        moves.keeps, self._found = self._found, self._found_now
        self._found_now = []
        if self._host is not None:
            self._host.next_plan()
        return moves if moves.saves or moves.loads or moves.keeps or moves.fetches else None

    def find_prefix(self, request: Request) -> BlockTables:
        prefix = super().find_prefix(request)
        self.is_looking = False
        if self._store is not None and request.capture is None:
            num_found, last = len(prefix[0]), (len(request.token_ids) - 1) // self.block_size
            if self._store.begin_checks(request.block_hashes[num_found:last]):
                self.is_looking = not self._store.await_checks()
                if not self.is_looking:
                    prefix = super().find_prefix(request)
        return prefix

    def has_room(self, request: Request, prefix: BlockTables) -> bool:
        if self.is_looking:
            return False  # who runs goes on meanwhile
        (table,) = prefix
        here = _here(table)
        num_needed = self._num_blocks(request.num_tokens) - len(here)
        return num_needed <= self.pool.num_free_blocks - self.pool.num_free_among(here)

    def enter(self, request: Request, prefix: BlockTables) -> None:
        (table,) = prefix
        here = _here(table)
        self.pool.acquire(here)
        below = [index for index, block_id in enumerate(table) if block_id == BELOW]
        slots = {index: self._slot(request.block_hashes[index]) for index in below}  # before others take them
        added = self.pool.allocate(self._num_blocks(request.num_tokens) - len(here))
        assert added is not None, "has_room was asked"
        if self._store is not None and not request.hash_root:
            for index, block_id in enumerate(table):
                block_hash = request.block_hashes[index]
                if block_id != BELOW and self._store.wants(block_hash):
                    self._found_now.append((block_id, block_hash))
        for index, block_id in zip(below, added, strict=False):
            table[index] = block_id
            self._bring(block_id, request.block_hashes[index], slots[index])
        self._begin(request, prefix)
        table.extend(added[len(below) :])

    def close(self) -> None:
        if self._store is not None:
            self._store.close()

    def _slot(self, block_hash: bytes) -> int | None:
        return self._host.read(block_hash) if self._host is not None and block_hash in self._host else None

    def _bring(self, block_id: int, block_hash: bytes, slot: int | None) -> None:
        if slot is None:
            assert self._store is not None
            self._store.use(block_hash)
            self._moves.fetches.append((block_id, block_hash))
            self.counts["num_blocks_from_store"] += 1
        else:
            self._moves.loads.append((block_id, slot))
            self.counts["num_blocks_from_host"] += 1
        self.pool.publish(block_id, block_hash)  # also for others that enter in this step

    def _evict(self, block_id: int, block_hash: bytes) -> None:
        slot = None if self._host is None else self._host.take(block_hash)
        if slot is not None:
            self._moves.saves.append((block_id, slot))
            self.counts["num_blocks_saved"] += 1

    def _is_below(self, block_hash: bytes) -> bool:
        if self._host is not None and block_hash in self._host:
            return True
        return self._store is not None and self._store.find(block_hash)


def _here(table: list[int]) -> list[int]:
    return [block_id for block_id in table if block_id != BELOW]


class TieredExecutor:
    """An executor whose plans say what moves."""

    def __init__(self, executor: Executor, cache: TieredCache) -> None:
        self._executor, self._cache = executor, cache
        self.num_blocks = executor.num_blocks

    def execute(self, plan: SchedulerOutput) -> PendingStep:
        plan.moves = self._cache.take_moves()
        return self._executor.execute(plan)

    def apply(self, function: Callable[[Any], Any]) -> list[Any]:
        return self._executor.apply(function)

    def close(self) -> None:
        try:
            self._executor.close()
        finally:
            self._cache.close()  # its threads would go on reading files
