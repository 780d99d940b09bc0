"""All-gather in place: each rank writes its columns of a matrix where they belong, in every rank's memory.

Owns when it is done so. A library gathers blocks, and another pass over all of them makes rows; here there is one, from
each rank's product to rows that every rank reads. Invariant: every rank makes the same calls in the same order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_BYTES = 2**27  # of a result


class InPlaceAllGather:
    """Call it with x [num_rows, n] for which `takes(x, width)`: the ranks' x side by side, [num_rows, width].

    The result is valid until the call after the next one; a rank that makes a call has read what it wants of the one
    before the last.
    """

    def __init__(self, rank: int, memories: Sequence[int], own: Tensor, owner: object) -> None:
        """own: this rank's `memory_bytes`, zeroed. memories, owner: as in `OneShotAllReduce`."""
        from nanovllm.kernels.triton.all_gather import memory_bytes
        from nanovllm.kernels.triton.all_reduce import PROGRAMS

        self._rank, self._own, self._owner = rank, own, owner
        self._half_bytes = (own.numel() - memory_bytes(len(memories), 0)) // 2
        self._memories = torch.tensor(memories, dtype=torch.int64, device=own.device)
        self._calls = torch.zeros(PROGRAMS.value, dtype=torch.int32, device=own.device)
        self._half = 0

    @staticmethod
    def memory_bytes(size: int, num_bytes: int) -> int:
        """What each of `size` ranks needs as memory that all can write, for results of so many bytes."""
        from nanovllm.kernels.triton.all_gather import memory_bytes

        return memory_bytes(size, min(num_bytes, MAX_BYTES) // 64 * 64)

    def takes(self, x: Tensor, width: int) -> bool:
        row_bytes, width_bytes = x.shape[1] * x.element_size(), width * x.element_size()
        return (
            0 < x.shape[0] * width_bytes <= self._half_bytes
            and row_bytes % 16 == width_bytes % 16 == 0
            and x.is_contiguous()
            and x.data_ptr() % 16 == 0
        )

    def __call__(self, x: Tensor, width: int) -> Tensor:
        from nanovllm.kernels.triton.all_gather import all_gather_triton

        self._half ^= 1
        size = len(self._memories)
        return all_gather_triton(
            x, self._own, self._memories, self._calls, self._rank, size, width, self._half_bytes, self._half
        )


def all_gather_reference(parts: Sequence[Tensor], width: int) -> Tensor:
    """parts: each rank's x."""
    return torch.cat(list(parts), dim=1)[:, :width]
