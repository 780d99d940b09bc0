"""share_memory: memory on each rank's GPU that the kernels of all ranks of the host can write.

Owns the one use of `torch.distributed._symmetric_memory`, which maps it. Invariant: it is zero on every rank before any
rank knows where it is.
"""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SharedMemory(NamedTuple):
    """addresses: each rank's memory as this rank's device reaches it, as long as `own` and `handle` live."""

    addresses: tuple[int, ...]
    own: Tensor
    handle: Any


def can_share_memory(rank: int, size: int, device: torch.device) -> bool:
    """Does this rank's device reach the memory of the others? They stand beside it, in the order of the ranks."""
    if device.type != "cuda":
        return False
    first = device.index - rank
    if first < 0 or first + size > torch.cuda.device_count():
        return False
    others = (index for index in range(first, first + size) if index != device.index)
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)


def share_memory(num_bytes: int, device: torch.device, group: Any) -> SharedMemory:
    """Every rank of the group calls it with the same size. Raises RuntimeError where the memory cannot be mapped."""
    from torch.distributed import _symmetric_memory

    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not used here, and not set up everywhere
    own = _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    own.zero_()
    torch.cuda.synchronize(device)
    handle = _symmetric_memory.rendezvous(own, group)
    return SharedMemory(tuple(handle.buffer_ptrs), own, handle)
