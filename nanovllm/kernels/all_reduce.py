"""One-shot all-reduce: each rank writes what it has straight into the other ranks' memory, in one kernel.

Owns when it is the better way. For a few rows what counts is not bandwidth but how often a message crosses the link:
here once. For many rows the values would be sent to every rank in full, which a ring that sends parts (NCCL's) does
better. Invariant: every rank makes the same calls in the same order; the choice depends on shape and dtype, which are
equal on all ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Bytes of x up to which its values travel with flags, and up to which this is done at all. Measured with two H100s on
# NVLink (NCCL: 12 us for 8 KB, 57 us for 8 MB); not with more.
WORDS_BYTES, MAX_BYTES = 2**20, 2**23


def limits(size: int, words_bytes: int = WORDS_BYTES, max_bytes: int = MAX_BYTES) -> tuple[int, int]:
    """Both for `size` ranks, multiples of 64: what is sent grows with the square of the number of peers."""
    most = max_bytes // (size - 1) ** 2 // 64 * 64
    return min(words_bytes, most), most


class OneShotAllReduce:
    """Call it with x [num_rows, n] for which `takes(x)`; returns the sum, the same bits on each rank."""

    def __init__(
        self,
        rank: int,
        memories: Sequence[int],
        device: torch.device,
        owner: object,
        words_bytes: int = WORDS_BYTES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """memories: for each rank, the address of its `memory_bytes`, zeroed, as this rank's device reaches it, for as
        long as `owner` lives.
        """
        from nanovllm.kernels.triton.all_reduce import PROGRAMS

        self._rank = rank
        self._owner = owner
        self._words_bytes, self._max_bytes = limits(len(memories), words_bytes, max_bytes)
        self._memories = torch.tensor(memories, dtype=torch.int64, device=device)
        self._calls = torch.zeros(PROGRAMS.value, dtype=torch.int32, device=device)

    @staticmethod
    def memory_bytes(size: int, words_bytes: int = WORDS_BYTES, max_bytes: int = MAX_BYTES) -> int:
        """What each of `size` ranks needs as memory that all can write."""
        from nanovllm.kernels.triton.all_reduce import memory_bytes

        return memory_bytes(size, *limits(size, words_bytes, max_bytes))

    def takes(self, x: Tensor) -> bool:
        num_bytes = x.numel() * x.element_size()
        return (
            0 < num_bytes <= self._max_bytes
            and num_bytes % 4 == 0
            and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and x.is_contiguous()
            and x.data_ptr() % 4 == 0
        )

    def __call__(self, x: Tensor) -> Tensor:
        from nanovllm.kernels.triton.all_reduce import all_reduce_triton

        size = len(self._memories)
        return all_reduce_triton(x, self._memories, self._calls, self._rank, size, self._words_bytes, self._max_bytes)


def all_reduce_reference(parts: Sequence[Tensor]) -> Tensor:
    """parts: each rank's x. Added up in float32 in the order of the ranks, then rounded."""
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return total.to(parts[0].dtype)
