"""TensorParallel: this process's place among those that share one model (Shoeybi et al., 2019).

Owns the collectives of the forward pass. It is handed to each parallel layer, so that a layer can be tested as any rank
without a process group. Invariant: size 1 never communicates.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TensorParallel:
    """rank in [0, size)."""

    rank: int = 0
    size: int = 1

    def shard(self, total: int, what: str) -> int:
        """The part of `total` that one rank holds; ValueError names `what` if it does not divide."""
        if total % self.size:
            raise ValueError(f"{what} = {total} cannot be divided among {self.size} tensor-parallel ranks")
        return total // self.size

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks."""
        assert self.size == 1
        return x
