"""WarmBlocks: the blocks of a store that were used last, in pinned host memory since before the engine is ready.

Owns that memory: reading a file into pinned memory takes longer than all else on the way to the device, and most
restarts are asked for what was asked yesterday. Invariant: a block that `find` returns is whole; one that is not here
is read from its file as always.

They are read before anything is asked: while memory is being pinned, whatever else wants the device waits.
"""

import warnings
from concurrent.futures import Future

import torch
from torch import Tensor

from nanovllm.tiers.block_files import BlockFiles
from nanovllm.tiers.host_memory import blocks_at_once, host_blocks


class WarmBlocks:
    def __init__(self, files: BlockFiles, num_bytes: int, max_bytes: int, device: torch.device) -> None:
        """num_bytes: of a block. max_bytes: of memory for all of them."""
        hashes = files.newest()[: max_bytes // num_bytes]
        at_once = blocks_at_once(num_bytes)
        reads: list[tuple[bytes, Tensor, Future[None]]] = []
        for start in range(0, len(hashes), at_once):
            some = hashes[start : start + at_once]
            try:
                rows = host_blocks(len(some), num_bytes, device)
            except RuntimeError as error:
                warnings.warn(f"no pinned memory for more of prefix_store: {error}", RuntimeWarning, stacklevel=1)
                break
            for block_hash, row in zip(some, rows, strict=True):
                reads.append((block_hash, row, files.begin_reading(block_hash, row.numpy())))
        # One that is gone, or has lost a part, is for the planner's check to find.
        self._blocks = {block_hash: row for block_hash, row, read in reads if read.exception() is None}

    def find(self, block_hash: bytes) -> Tensor | None:
        """uint8 [num_bytes], pinned on a GPU; never written again."""
        return self._blocks.get(block_hash)
