"""WarmBlocks: the blocks of a store that were used last, in pinned host memory since the engine started.

Owns that memory and the thread that fills it: reading a file into pinned memory takes longer than all else on the way
to the device, and most restarts are asked for what was asked yesterday. Invariant: a block that `find` returns is
whole; one that is not here is read from its file as always.
"""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from nanovllm.tiers.block_file import read_block
from nanovllm.tiers.host_memory import blocks_at_once, host_blocks
from nanovllm.tiers.store import newest, path_of

_NUM_READERS = 8


class WarmBlocks:
    def __init__(self, folder: Path, num_bytes: int, max_bytes: int, device: torch.device) -> None:
        """folder: of one rank's files. num_bytes: of a block. max_bytes: of memory for all of them."""
        self._folder, self._num_bytes, self._device = folder, num_bytes, device
        self._blocks: dict[bytes, Tensor] = {}
        self._is_closed = False
        self._thread = threading.Thread(target=self._fill, args=(max_bytes // num_bytes,), daemon=True)
        self._thread.start()

    def find(self, block_hash: bytes) -> Tensor | None:
        """uint8 [num_bytes], pinned on a GPU; never written again."""
        return self._blocks.get(block_hash)

    def _fill(self, num_blocks: int) -> None:
        hashes = newest(self._folder)[:num_blocks]
        at_once = blocks_at_once(self._num_bytes)
        with ThreadPoolExecutor(_NUM_READERS, "nanovllm store") as readers:
            for start in range(0, len(hashes), at_once):
                some = hashes[start : start + at_once]
                try:
                    rows = host_blocks(len(some), self._num_bytes, self._device)
                except RuntimeError as error:
                    warnings.warn(f"no pinned memory for more of prefix_store: {error}", RuntimeWarning, stacklevel=1)
                    return
                for block_hash, row, is_read in zip(some, rows, readers.map(self._read, some, rows), strict=True):
                    if is_read:
                        self._blocks[block_hash] = row
                if self._is_closed:
                    return

    def _read(self, block_hash: bytes, row: Tensor) -> bool:
        try:
            if not self._is_closed:
                read_block(path_of(self._folder, block_hash), row.numpy())
                return True
        except (OSError, ValueError):
            pass  # gone, or harmed, which the planner's check will find
        return False

    def close(self) -> None:
        self._is_closed = True
        self._thread.join()
