"""SnapshotPool: copies of layers' states at points of a history, found by the hash of the block that ends there.

Owns the slots of the copies, what each would save, and which one goes for another; it never touches a state and knows
no request. Invariant: a slot is free, reserved by one who will fill it, or holds one snapshot that can be found.

What goes first is chosen as by GreedyDual (Cao and Irani, 1997): a snapshot is worth the tokens that would be computed
again without it, those behind the one before it on its history. All take equally many bytes, so tokens are tokens for
bytes. Whoever gives way sets the level from which those that come or are used afterwards start, so what nobody uses
goes in the end, whatever it is worth.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(slots=True)
class Snapshot:
    """num_tokens: of its history. before: the next shorter snapshot on it, if there is one."""

    slot: int
    block_hash: bytes
    num_tokens: int
    before: "Snapshot | None"
    level: int  # of the pool when it came, or was last used
    is_used: bool = False

    @property
    def num_tokens_saved(self) -> int:
        return self.num_tokens - (self.before.num_tokens if self.before is not None else 0)

    @property
    def priority(self) -> int:
        return self.level + self.num_tokens_saved


class SnapshotPool:
    def __init__(self, slots: range, has_blocks: Callable[[bytes], bool]) -> None:
        """has_blocks: are the keys and values there, without which a snapshot with this hash is worth nothing?"""
        self.slots = slots
        self._has_blocks = has_blocks
        self._level = 0
        self._free = list(reversed(slots))
        self._by_hash: dict[bytes, Snapshot] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def find(self, block_hash: bytes) -> Snapshot | None:
        return self._by_hash.get(block_hash)

    def use(self, snapshot: Snapshot) -> None:
        """It has saved someone its tokens."""
        snapshot.level, snapshot.is_used = self._level, True

    def reserve(self, num_tokens_saved: int, kept: Collection[int] = ()) -> int | None:
        """A slot for a snapshot that would save so much; None if all that could give way are worth more.

        kept: slots that are still read.
        """
        if not self._free:
            others = [snapshot for snapshot in self._by_hash.values() if snapshot.slot not in kept]
            least = min(others, key=self._priority, default=None)
            if least is None or self._priority(least) > self._level + num_tokens_saved:
                return None
            self._level = max(self._level, self._priority(least))
            self.drop(least)
        return self._free.pop()

    def _priority(self, snapshot: Snapshot) -> int:
        return snapshot.priority if self._has_blocks(snapshot.block_hash) else 0

    def give_back(self, slot: int) -> None:
        """A reserved slot that will not be filled."""
        self._free.append(slot)

    def publish(self, slot: int, block_hash: bytes, num_tokens: int, before: Snapshot | None) -> None:
        """Let what was reserved be found. Of two with the same history the first one stays."""
        if block_hash in self._by_hash:
            self.give_back(slot)
        else:
            self._by_hash[block_hash] = Snapshot(slot, block_hash, num_tokens, before, self._level)

    def drop(self, snapshot: Snapshot) -> None:
        """Forget one; those behind it are worth more from now on."""
        del self._by_hash[snapshot.block_hash]
        self._free.append(snapshot.slot)
        for other in self._by_hash.values():
            if other.before is snapshot:
                other.before = snapshot.before

    def forget(self) -> None:
        """Forget all of them; what is reserved stays so."""
        self._free.extend(snapshot.slot for snapshot in self._by_hash.values())
        self._by_hash.clear()
