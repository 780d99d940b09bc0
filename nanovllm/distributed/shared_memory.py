"""share_memory: memory on each rank's GPU that the kernels of all ranks of the host can write.

Owns the one use of `torch.distributed._symmetric_memory`, which maps it. Invariant: it is zero on every rank before any
rank gets to use it.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class SharedMemory(NamedTuple):
    """addresses: each rank's memory as this rank's device reaches it, as long as `own` and `handle` live."""

    addresses: tuple[int, ...]
    own: Tensor
    handle: Any


def can_share_memory(size: int, device: torch.device) -> bool:
    """Do the devices of this host reach each other's memory, and are there as many as ranks?"""
    if device.type != "cuda" or torch.cuda.device_count() < size:
        return False
    others = (index for index in range(torch.cuda.device_count()) if index != device.index)
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)


def share_memory(num_bytes: int, device: torch.device, group: Any) -> SharedMemory:
    """Every rank of the group calls it with the same size."""
    from torch.distributed import _symmetric_memory

    own = _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    handle = _symmetric_memory.rendezvous(own, group)
    own.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group=group, device_ids=[device.index])
    return SharedMemory(tuple(handle.buffer_ptrs), own, handle)
