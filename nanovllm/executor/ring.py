"""A broadcast ring: one process writes messages of any size into shared memory, several others read each of them.

        memory   | acknowledged by reader 0 | by reader 1 | ... |   bytes, written round and round   |
        pipes    writer -> each reader: how many bytes have been written so far

Owns the memory, which has no name, and the pipes, through which a reader sleeps until there is something to read.
Invariant: a byte is overwritten only after every reader has acknowledged it, so no message is lost, however slow a
reader is; a message larger than the ring goes through it piece by piece.
"""

import mmap
import os
import tempfile
from collections.abc import Callable

_LINE = 64  # bytes from one counter to the next: processors share memory in pieces of this size
_HEADER = 8  # bytes of a message's length


class RingWriter:
    """capacity: bytes in the ring. Give each reader its `reader_fds`, then call `release_reader_fds`."""

    def __init__(self, num_readers: int, capacity: int = 2**20) -> None:
        size = num_readers * _LINE + capacity
        self._memory_fd = _nameless_memory(size)
        self._memory = mmap.mmap(self._memory_fd, size)
        with memoryview(self._memory) as view, view[: num_readers * _LINE] as counters, counters.cast("Q") as numbers:
            self._acknowledged = numbers[:: _LINE // 8]
            self._ring = view[num_readers * _LINE :]
        pipes = [os.pipe() for _ in range(num_readers)]
        self._read_ends = [read_end for read_end, _ in pipes]
        self._doorbells = [write_end for _, write_end in pipes]
        for doorbell in self._doorbells:
            os.set_blocking(doorbell, False)
        self._written = 0

    def reader_fds(self, reader: int) -> tuple[int, int]:
        """File descriptors for `RingReader` in another process."""
        return self._memory_fd, self._read_ends[reader]

    def release_reader_fds(self) -> None:
        """Close what only the readers need, so that the memory goes when the last process does."""
        for fd in (self._memory_fd, *self._read_ends):
            os.close(fd)
        self._read_ends = []

    def write(self, message: bytes, wait: Callable[[], None]) -> None:
        """Queue `message` for every reader. wait: called while there is no room; it may sleep, and raise to give up."""
        capacity = len(self._ring)
        rest = memoryview(len(message).to_bytes(_HEADER, "little") + message)
        while rest:
            room = capacity - (self._written - min(self._acknowledged))
            if room == 0:
                wait()
                continue
            at = self._written % capacity
            piece = rest[: min(room, capacity - at)]
            self._ring[at : at + len(piece)] = piece
            self._written += len(piece)
            rest = rest[len(piece) :]
            for doorbell in self._doorbells:
                self._announce(doorbell, wait)

    def _announce(self, doorbell: int, wait: Callable[[], None]) -> None:
        while True:
            try:
                os.write(doorbell, self._written.to_bytes(8, "little"))
                return
            except BlockingIOError:  # thousands of messages behind
                wait()
            except BrokenPipeError:  # the reader has ended; whoever waits for its answer will see
                return

    def close(self) -> None:
        """Readers see the end of the stream. May be called twice."""
        for doorbell in self._doorbells:
            os.close(doorbell)
        self._doorbells = []
        self._acknowledged.release()
        self._ring.release()
        self._memory.close()


class RingReader:
    """The end of reader number `reader` of `num_readers`; the descriptors are from `RingWriter.reader_fds`."""

    def __init__(self, memory_fd: int, doorbell: int, reader: int, num_readers: int) -> None:
        memory = mmap.mmap(memory_fd, 0)
        os.close(memory_fd)
        view = memoryview(memory)
        self._acknowledged = view[reader * _LINE : reader * _LINE + 8].cast("Q")
        self._ring = view[num_readers * _LINE :]
        self._doorbell = doorbell
        self._written = self._read = 0

    def read(self) -> bytes:
        """Wait for the next message. Raises EOFError once the writer has closed, or has died."""
        return bytes(self._take(int.from_bytes(self._take(_HEADER), "little")))

    def _take(self, count: int) -> bytearray:
        taken = bytearray(count)
        done, capacity = 0, len(self._ring)
        while done < count:
            if self._read == self._written:
                self._await_doorbell()
            at = self._read % capacity
            size = min(self._written - self._read, count - done, capacity - at)
            taken[done : done + size] = self._ring[at : at + size]
            done += size
            self._read += size
            self._acknowledged[0] = self._read
        return taken

    def _await_doorbell(self) -> None:
        # Numbers arrive whole: the kernel never splits so short a write. The last one is the newest.
        numbers = os.read(self._doorbell, 2**12)
        if not numbers:
            raise EOFError("the writer has closed the ring")
        self._written = int.from_bytes(numbers[-8:], "little")


def _nameless_memory(size: int) -> int:
    """A descriptor of zeroed shared memory that is in no folder: nothing has to be removed, whoever dies."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("nanovllm")
    else:
        with tempfile.TemporaryFile() as file:  # removed from its folder as soon as it is open
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
