"""HostSlots: which evicted blocks are kept in host memory, and where.

Owns the planner's list of slots; the memory is the worker's (`mover.py`), which does in every plan what was decided
here. Invariant: a slot that the plan in the making reads is not written by it.
"""

from collections import OrderedDict


class HostSlots:
    """num_slots: blocks that the host has room for; least recently used ones go first."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self.clear()

    def clear(self) -> None:
        self._free = list(range(self._num_slots - 1, -1, -1))
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # by the hash of the block's content
        self._read: set[bytes] = set()  # by the plan in the making

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slots

    def read(self, block_hash: bytes) -> int:
        """The slot of a block that is here; it stays until `next_plan`."""
        self._slots.move_to_end(block_hash)
        self._read.add(block_hash)
        return self._slots[block_hash]

    def take(self, block_hash: bytes) -> int | None:
        """A slot for a block that is evicted; None if it is here already, or no slot can be had."""
        if block_hash in self._slots:
            self._slots.move_to_end(block_hash)
            return None
        if self._free:
            slot = self._free.pop()
        else:
            oldest = next((one for one in self._slots if one not in self._read), None)
            if oldest is None:
                return None
            slot = self._slots.pop(oldest)
        self._slots[block_hash] = slot
        return slot

    def next_plan(self) -> None:
        self._read.clear()
