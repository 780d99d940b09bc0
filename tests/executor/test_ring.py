import time
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import pytest

from nanovllm.executor.children import Children, start_child
from nanovllm.executor.ring import RingReader, RingWriter


def fail() -> None:
    pytest.fail("the writer found no room")


def wait() -> None:
    pass


def read_all(ring: RingWriter, messages: Iterable[bytes], num_readers: int) -> tuple[Any, list[Any]]:
    """What was written, and what each reader process saw of it: number of messages, and their digest."""
    children = Children()
    for reader in range(num_readers):
        fds = ring.reader_fds(reader)
        children.add(start_child(f"{reader}", "tests.executor.ring_process", (reader, num_readers, *fds), fds))
    ring.release_reader_fds()
    digest, count = blake2b(), 0
    for message in messages:
        ring.write(message, wait)
        digest.update(message)
        count += 1
    ring.close()
    seen: list[Any] = []
    while len(seen) < num_readers:
        assert children.wait(time.monotonic() + 60)
        seen += [report for _, report in children.receive()]
    children.kill()
    return (count, digest.hexdigest()), seen


def test_no_message_is_lost_or_overwritten_with_a_slow_reader() -> None:
    messages = (number.to_bytes(4, "little") * (1 + number % 97) for number in range(100_000))
    written, seen = read_all(RingWriter(2, capacity=2**14), messages, 2)
    assert written[0] == 100_000 and seen == [written, written]


def test_messages_of_any_size() -> None:
    """Far smaller and far larger than the ring, and exactly as large."""
    sizes = [0, 1, 2**16 - 9, 2**16 - 8, 2**16 - 7, 2**16, 10_000_019, 3, 2**20]
    messages = [bytes(range(251)) * (size // 251) + bytes(size % 251) for size in sizes]
    written, seen = read_all(RingWriter(2, capacity=2**16), messages, 2)
    assert seen == [written, written]


def test_a_message_waits_for_the_slowest_reader() -> None:
    ring = RingWriter(2, capacity=64)
    readers = [RingReader(*ring.reader_fds(0), 0, 2)]  # the second one never reads
    ring.write(bytes(40), fail)
    assert readers[0].read() == bytes(40)
    with pytest.raises(TimeoutError):
        ring.write(bytes(40), give_up)


def give_up() -> None:
    raise TimeoutError


def test_the_end_of_the_writer_is_seen() -> None:
    ring = RingWriter(1)
    reader = RingReader(*ring.reader_fds(0), 0, 1)
    ring.write(b"last", fail)
    ring.close()
    ring.close()
    assert reader.read() == b"last"
    with pytest.raises(EOFError):
        reader.read()
