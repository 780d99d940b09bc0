"""Host memory for KV blocks, pinned where a GPU copies from and to it.

Owns how it is asked for: PyTorch rounds each pinned allocation up to a power of two, so memory for many blocks is taken
in pieces just below one.
"""

import torch
from torch import Tensor

_PIECE_BYTES = 256 * 2**20


def blocks_at_once(num_bytes: int) -> int:
    """How many blocks of so many bytes one piece holds."""
    return max(1, _PIECE_BYTES // num_bytes)


def host_blocks(num_blocks: int, num_bytes: int, device: torch.device) -> list[Tensor]:
    """uint8 [num_bytes] for each block, uninitialised. Raises RuntimeError where no more memory can be pinned."""
    at_once = blocks_at_once(num_bytes)
    blocks: list[Tensor] = []
    for start in range(0, num_blocks, at_once):
        shape = min(at_once, num_blocks - start), num_bytes
        blocks += torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda").unbind()
    return blocks
