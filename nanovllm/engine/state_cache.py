"""StateCache: a CacheManager for models some of whose layers keep a state in the place of keys and values.

A state sums up its whole history, so one cannot be cut back to a prefix as keys and values can: it is there at a token
or not. Owns, beside the block tables, where on a history snapshots are taken and which of them a request begins from
(`snapshot_pool.py` has their slots). Invariant: a request begins from a snapshot that a step planned earlier fills, and
its state sums up all its computed tokens.

    blocks       | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 ..|      of a prompt
    snapshots                    ^           ^       ^        every 2^k blocks; where others part; the last full block

A hit is the longest prefix that has its blocks and ends at a snapshot; what is behind it is computed again. While a
request decodes, one snapshot of it moves along, so its next turn begins where this one ended.

The snapshots that a row is to write lie in a table beside its block table, by the block at whose end they are taken. An
entry goes out with the step that opens this block; the first entry of a new row, if its prefix is not empty, is the one
it begins from.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from nanovllm.engine.block_pool import BlockPool
from nanovllm.engine.cache_manager import BlockTables, CacheManager
from nanovllm.engine.request import Request
from nanovllm.engine.snapshot_pool import SnapshotPool

STRIDE = 64  # tokens: snapshots are no nearer to each other, but for the ends of prompts
WORTH_A_STEP = 4 * STRIDE  # tokens: for so many that another request is about to compute, it is waited
MOST_OF_A_PROMPT = 8  # snapshots in the midst of it
MOST_WAITING = 32  # requests whose prompts are looked at


@dataclass(slots=True)
class _Running:
    """What is known of a request that holds blocks.

    points: blocks at whose ends snapshots are wanted, of the num_known blocks that it entered with. reserved: slots by
    block, for snapshots that it will write. begins_from: the slot, and its place in the table.
    """

    points: set[int]
    num_known: int
    num_tokens_safe: int  # of its history, up to its last snapshot
    begins_from: tuple[int, int] | None
    reserved: dict[int, int] = field(default_factory=dict)
    moving: bytes | None = None  # the hash of the snapshot that moves along


@dataclass(frozen=True, slots=True)
class _Fresh:
    """A snapshot that the step being planned will fill; it can be used in the next one."""

    request: Request
    slot: int
    block_hash: bytes
    num_blocks: int


class _Pool(BlockPool):
    """Whoever empties the prefix cache means snapshots, too."""

    snapshots: SnapshotPool

    def forget_cached(self) -> None:
        super().forget_cached()
        self.snapshots.forget()


class StateCache(CacheManager):
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool,
        *,
        slots: range,
        max_model_len: int,
        max_step_tokens: int,
        unit: int = 1,
        stride: int = STRIDE,
        worth_a_step: int = WORTH_A_STEP,
    ) -> None:
        """slots: of the snapshots. max_step_tokens: the most that a step computes of one request. unit: tokens, at
        multiples of which, and of block_size, the device can keep a state in the midst of a prompt.
        """
        super().__init__(num_blocks, block_size, enable_prefix_caching)
        self.waiting: Callable[[], Iterable[Request]] = tuple  # the scheduler's queue, once there is one
        self._slots = slots
        self._table_width = self._num_blocks(max_model_len)
        self._most_apart = max(1, max_step_tokens // block_size)
        self._unit = max(1, unit // block_size)  # blocks
        self._stride = max(self._unit, stride // block_size)
        self._worth_a_step = worth_a_step
        self.clear()

    def clear(self) -> None:
        self.pool = pool = _Pool(self.pool.num_blocks)
        self.snapshots = pool.snapshots = SnapshotPool(self._slots, lambda key: pool.find(key) is not None)
        self._running: dict[Request, _Running] = {}
        self._fresh: list[_Fresh] = []
        self._read: list[tuple[Request, int]] = []  # slots that new rows begin from

    # -- what a request finds --

    def find_prefix(self, request: Request) -> BlockTables:
        """As of any CacheManager, up to the last snapshot."""
        self._settle()
        (table,) = super().find_prefix(request)
        hashes = self._hashes(request, len(table))
        while table and self.snapshots.find(hashes[len(table) - 1]) is None:
            table.pop()
        return [table]

    def has_room(self, request: Request, prefix: BlockTables) -> bool:
        """Also False, for one step, where this step computes much of what the request would compute once more."""
        return super().has_room(request, prefix) and not self._is_computed_now(request, self.num_tokens(prefix))

    def _is_computed_now(self, request: Request, num_tokens: int) -> bool:
        if request.capture is not None or request.scoring is not None:
            return False
        num_blocks = (len(request.token_ids) - 1) // self.block_size
        for fresh in self._fresh:
            is_worth_it = fresh.num_blocks * self.block_size - num_tokens >= self._worth_a_step
            if not is_worth_it or fresh.num_blocks > num_blocks or not self._may_share(request, fresh.request):
                continue
            if self._hashes(request, num_blocks)[fresh.num_blocks - 1] == fresh.block_hash:
                return True
        return False

    def _may_share(self, request: Request, other: Request) -> bool:
        return self.enable_prefix_caching or other in request.siblings

    # -- what a request holds --

    def enter(self, request: Request, prefix: BlockTables) -> None:
        first = len(prefix[0])
        begins_from = None
        if first:
            snapshot = self.snapshots.find(self._hashes(request, first)[first - 1])
            assert snapshot is not None, "find_prefix found it"
            self.snapshots.use(snapshot)
            begins_from = (self._table_width + first - 1, snapshot.slot)
            self._read.append((request, snapshot.slot))
        points = self._points(request, first)
        super().enter(request, prefix)
        num_known = self._num_blocks(len(request.token_ids))
        self._running[request] = _Running(points, num_known, first * self.block_size, begins_from)

    def _points(self, request: Request, first: int) -> set[int]:
        """Blocks of the tokens it has, behind the first ones, at whose ends snapshots are wanted."""
        if not self.enable_prefix_caching and not request.siblings:
            return set()
        last = (len(request.token_ids) - 1) // self.block_size
        apart = 1 << max(0, (last - first - 1) // MOST_OF_A_PROMPT).bit_length()
        apart = max(min(apart, 1 << self._most_apart.bit_length() - 1), self._stride)
        ends = {last, *range(apart, last, apart), *self._partings(request, first, last)}
        (found,) = super().find_prefix(request)
        ends.add(len(found))  # another history parts from this one there
        ends = {end - end % self._unit for end in ends if end <= last}
        return {end - 1 for end in ends if end > first}

    def _partings(self, request: Request, first: int, last: int) -> set[int]:
        """Where requests that wait part from this one."""
        partings = set[int]()
        for other in islice(self.waiting(), MOST_WAITING):
            if other is not request and other.cache_salt == request.cache_salt and self._may_share(request, other):
                end = min(last, (len(other.token_ids) - 1) // self.block_size)
                num_common = _num_common(request.token_ids, other.token_ids, end, self.block_size)
                if num_common - first >= self._stride:
                    partings.add(num_common)
        return partings

    def allocate(self, request: Request, num_new_tokens: int) -> list[tuple[int, int]] | None:
        start = request.num_computed_tokens
        added = super().allocate(request, num_new_tokens)
        return None if added is None else added + self._reserve(request, start, start + num_new_tokens)

    def _reserve(self, request: Request, start: int, end: int) -> list[tuple[int, int]]:
        """Slots for the snapshots at the ends of the blocks that these tokens open, as entries of a plan."""
        running = self._running[request]
        added = []
        for block in range(self._num_blocks(start), self._num_blocks(end)):
            if block in running.reserved or not self._is_wanted(request, running, block):
                continue  # the first: where a draft was rejected that would have opened it
            num_tokens = (block + 1) * self.block_size
            slot = self.snapshots.reserve(num_tokens - running.num_tokens_safe, [slot for _, slot in self._read])
            if slot is not None:
                running.reserved[block] = slot
                if block < running.num_known:
                    running.num_tokens_safe = num_tokens
                added.append((self._table_width + block, slot))
        return added

    def _is_wanted(self, request: Request, running: _Running, block: int) -> bool:
        if block in running.points:
            return True
        is_decoded = block >= running.num_known - 1 and self.enable_prefix_caching
        return is_decoded and (block + 1) % self._stride == 0

    def tables(self, request: Request) -> tuple[list[int], list[tuple[int, int]]]:
        running = self._running[request]
        first, _ = super().tables(request)
        entries = [] if running.begins_from is None else [running.begins_from]
        entries += [(self._table_width + block, slot) for block, slot in running.reserved.items()]
        return first, entries

    def release(self, request: Request) -> None:
        super().release(request)
        for slot in self._running.pop(request).reserved.values():
            self.snapshots.give_back(slot)

    # -- what others find --

    def publish(self, request: Request, num_computed_tokens: int) -> None:
        super().publish(request, num_computed_tokens)
        running = self._running[request]
        for block in [block for block in running.reserved if block < request.num_published_blocks]:
            slot, block_hash = running.reserved.pop(block), self._hashes(request, block + 1)[block]
            self._fresh.append(_Fresh(request, slot, block_hash, block + 1))
            if block >= running.num_known - 1 and block not in running.points:
                self._move(running, block_hash)
        self._settle()

    def _move(self, running: _Running, block_hash: bytes) -> None:
        """The request's newest snapshot takes the place of the one before, unless someone has used that."""
        passed = None if running.moving is None else self.snapshots.find(running.moving)
        if passed is not None and not passed.is_used and passed.slot not in [slot for _, slot in self._read]:
            self.snapshots.drop(passed)
        running.moving = block_hash

    def _settle(self) -> None:
        """Counters have moved for what earlier steps compute: that can be found, and is not read any more."""
        fresh, self._fresh = self._fresh, []
        for one in fresh:
            if one.request.num_computed_tokens < one.num_blocks * self.block_size:
                self._fresh.append(one)
                continue
            hashes = one.request.block_hashes
            before = next(filter(None, map(self.snapshots.find, reversed(hashes[: one.num_blocks - 1]))), None)
            self.snapshots.publish(one.slot, one.block_hash, one.num_blocks * self.block_size, before)
        self._read = [(r, slot) for r, slot in self._read if self._begins_now(r)]

    def _begins_now(self, request: Request) -> bool:
        running = self._running.get(request)
        if running is None or running.begins_from is None:
            return False
        num_blocks = running.begins_from[0] - self._table_width + 1
        return request.num_computed_tokens == num_blocks * self.block_size


def _num_common(a: list[int], b: list[int], num_blocks: int, block_size: int) -> int:
    """How many blocks, of at most so many, two histories have in common."""
    low, high = 0, num_blocks
    while low < high:
        middle = (low + high + 1) // 2
        if a[low * block_size : middle * block_size] == b[low * block_size : middle * block_size]:
            low = middle
        else:
            high = middle - 1
    return low
