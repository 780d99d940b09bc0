"""Reads a ring to its end and reports what it saw; reader 0 dawdles."""

import sys
import time
from hashlib import blake2b

from nanovllm.executor.children import connect_to_parent
from nanovllm.executor.ring import RingReader


def main(arguments: list[str]) -> None:
    connection, (reader, num_readers, memory_fd, doorbell) = connect_to_parent(arguments)
    ring = RingReader(memory_fd, doorbell, reader, num_readers)
    digest, count = blake2b(), 0
    try:
        while True:
            digest.update(ring.read())
            count += 1
            if reader == 0 and count % 5000 == 0:
                time.sleep(0.02)
    except EOFError:
        connection.send((count, digest.hexdigest()))
        connection.recv()  # stays until it is ended, so that its end is no surprise


if __name__ == "__main__":
    main(sys.argv[1:])
