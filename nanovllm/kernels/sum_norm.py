"""Sum over the ranks, residual addition and norm in one: what stands between two products of tensor parallelism.

Owns when one kernel does it, and the memory for that. A step's sums are small, so what counts is how often something is
waited for: a kernel's beginning, a crossing of the link. Invariant: every rank makes the same calls in the same order;
the choice depends on shape and dtype, which are equal on all ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm.kernels.all_reduce import all_reduce_reference
from nanovllm.kernels.rms_norm import add_rms_norm_reference

MAX_ROWS = 256  # more take as long as sending them needs, which NCCL does with half the bytes


class SumNorm:
    """Call it with x [num_rows, n] for which `takes(x)`: (norm of the ranks' sum of x + residual, that sum + residual).

    Of the second a rank has only the rows that it adds up: it is for this rank's next call, with as many rows, alone.
    """

    def __init__(
        self, rank: int, memories: Sequence[int], dim: int, itemsize: int, device: torch.device, owner: object
    ) -> None:
        """dim, itemsize: of rows. memories, owner: as in `OneShotAllReduce`."""
        from nanovllm.kernels.triton.all_reduce import PROGRAMS

        self._rank, self._owner = rank, owner
        self._row_bytes = dim * itemsize
        self._memories = torch.tensor(memories, dtype=torch.int64, device=device)
        self._calls = torch.zeros(PROGRAMS.value, dtype=torch.int32, device=device)

    @staticmethod
    def memory_bytes(size: int, dim: int, itemsize: int) -> int:
        """What each of `size` ranks needs as memory that all can write, zeroed."""
        from nanovllm.kernels.triton.sum_norm import memory_bytes

        return memory_bytes(size, dim * itemsize // 4, _room(size))

    def takes(self, x: Tensor) -> bool:
        return (
            0 < x.shape[0] <= MAX_ROWS
            and x.shape[1] * x.element_size() == self._row_bytes
            and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and x.is_contiguous()
            and x.data_ptr() % 4 == 0
        )

    def __call__(
        self, x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, next_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """next_weight: of the product behind, which is fetched on the way."""
        from nanovllm.kernels.triton.sum_norm import sum_norm_triton

        size = len(self._memories)
        is_few = x.shape[0] <= few_rows(size)
        given = x, residual, norm_weight, eps, next_weight, self._memories, self._calls
        return sum_norm_triton(*given, self._rank, size, _room(size), is_few)


def can_sum_norm(dim: int, itemsize: int) -> bool:
    """May rows of this size be summed so?"""
    from nanovllm.kernels.triton.sum_norm import MAX_WORDS

    return dim * itemsize % 4 == 0 and dim * itemsize // 4 <= MAX_WORDS


def few_rows(size: int) -> int:
    """Up to how many rows every rank adds up all: of two ranks, each sends as much one way as the other."""
    return 128 if size == 2 else 8


def _room(size: int) -> int:
    """Rows that a rank adds up at most."""
    return max(-(-MAX_ROWS // size), few_rows(size))


def sum_norm_reference(
    parts: Sequence[Tensor], residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """parts: each rank's x. Every row of both."""
    return add_rms_norm_reference(all_reduce_reference(parts), residual, norm_weight, eps)
