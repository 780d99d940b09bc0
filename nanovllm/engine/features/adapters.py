"""Adapters, as planning knows them: which one a request is computed with, and which of them have a slot on the device.

Owns the slots' assignment. What an adapter holds, and where a request's comes from, is known elsewhere. Invariant: of
the running requests no two adapters have the same slot, and a slot that one of them reads is not given away.
"""

from collections.abc import Sequence

from nanovllm.engine.request import Request


class AdapterRef:
    """One version of an adapter. key: of its content, so that what was computed with other numbers is not its.

    The workers keep the content for as long as any request, or the name itself, holds on to this object.
    """

    def __init__(self, key: bytes) -> None:
        self.key = key

    def give_to(self, requests: Sequence[Request]) -> None:
        """Of requests that are not queued yet. They share blocks of KV with those of the same content alone."""
        for request in requests:
            request.adapter = AdapterUse(self)
            request.cache_salt += self.key


class AdapterUse:
    """A request's part: its adapter, and while it runs the slot where that is."""

    def __init__(self, ref: AdapterRef) -> None:
        self.ref = ref
        self.slot = -1

    @property
    def key(self) -> bytes:
        return self.ref.key

    @property
    def place(self) -> tuple[int, bytes]:
        """As in NewRow."""
        return self.slot, self.key


class AdapterSlots:
    """A request waits, and so do those behind it, until its adapter has one of so many slots."""

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._slots: dict[bytes, int] = {}  # by key, the least recently admitted first

    def admits(self, request: Request, running: Sequence[Request]) -> bool:
        if request.adapter is None:
            return True
        key = request.adapter.key
        slot = self._slots.pop(key, None)
        if slot is None and len(self._slots) < self._num_slots:
            slot = len(self._slots)
        if slot is None:
            in_use = {other.adapter.key for other in running if other.adapter is not None}
            idle = next((other for other in self._slots if other not in in_use), None)
            if idle is None:
                return False
            slot = self._slots.pop(idle)
        self._slots[key] = request.adapter.slot = slot
        return True
