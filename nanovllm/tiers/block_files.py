"""BlockFiles: the threads that write and read the files of one rank's blocks, and the size of their folder.

Owns both; a file's form is `block_file.py`'s. Invariant: no file that was used within the last minute is removed, since
somebody may be about to read it. A disk that is full ends the writing and not the engine.
"""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nanovllm.tiers.block_file import read_block, write_block
from nanovllm.tiers.store import newest, path_of

_NUM_READERS = 16
_YOUNG_SECONDS = 60.0
_FILES_BETWEEN_LOOKS = 64  # at the size of the folder


class BlockFiles:
    def __init__(self, folder: Path, max_bytes: int) -> None:
        """max_bytes: more than that only until the next look."""
        self._folder, self._max_bytes = folder, max_bytes
        self._writer = ThreadPoolExecutor(1, "nanovllm store")
        self._readers = ThreadPoolExecutor(_NUM_READERS, "nanovllm store")
        self._num_written = 0
        self._is_full = False

    def newest(self) -> list[bytes]:
        """See `store.newest`."""
        return newest(self._folder)

    def begin_reading(self, block_hash: bytes, into: np.ndarray) -> "Future[None]":
        return self._readers.submit(read_block, path_of(self._folder, block_hash), into)

    def write(self, hashes: Sequence[bytes], blocks: Tensor, arrived: Any) -> None:
        """blocks: on the host, whole once the event has come, if there is one."""
        self._writer.submit(self._write, hashes, blocks, arrived)

    def _write(self, hashes: Sequence[bytes], blocks: Tensor, arrived: Any) -> None:
        if arrived is not None:
            arrived.synchronize()
        try:
            for block_hash, block in zip(hashes, blocks.numpy(), strict=True):
                if not self._is_full:
                    write_block(path_of(self._folder, block_hash), block, {"block": block_hash.hex()})
                    self._num_written += 1
                    if self._num_written % _FILES_BETWEEN_LOOKS == 1:
                        self._trim()
        except OSError as error:
            self._is_full = True
            warnings.warn(f"nothing more is written into prefix_store: {error}", RuntimeWarning, stacklevel=1)

    def _trim(self) -> None:
        """Remove what was used longest ago, and what a process that ended has left half written."""
        files = []
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):  # another process does the same
                status = entry.stat()
                files.append((status.st_mtime, status.st_size, entry.path))
        files.sort(reverse=True)
        total = 0
        for mtime, size, path in files:
            total += size
            is_old = files[0][0] - mtime > _YOUNG_SECONDS  # as the folder's own clock has it
            if is_old and (total > self._max_bytes or path.endswith(".new")):
                with suppress(FileNotFoundError):
                    os.unlink(path)

    def close(self) -> None:
        """Return when all is written."""
        self._writer.shutdown()
        self._readers.shutdown()
