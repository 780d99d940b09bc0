"""TensorParallel: this process's place among those that share one model (Shoeybi et al., 2019).

Owns the collectives of the forward pass and which part of a weight a rank holds. It is handed to each layer, so
that a layer can be tested as any rank without a process group. Invariant: size 1 never communicates, and every rank
calls the same collectives in the same order.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name; torch 2.13 warns of old


class Sum(Protocol):
    """Another way to add up what the ranks have, for some tensors: `kernels/all_reduce.py`."""

    def takes(self, x: Tensor) -> bool: ...

    def __call__(self, x: Tensor) -> Tensor: ...


class NormedSum(Protocol):
    """One kernel for a sum, the residual addition and the norm behind it: `kernels/sum_norm.py`."""

    def takes(self, x: Tensor) -> bool: ...

    def __call__(
        self, x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, next_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


class Gather(Protocol):
    """Another way to put columns side by side: `kernels/all_gather.py`."""

    def takes(self, x: Tensor, width: int) -> bool: ...

    def __call__(self, x: Tensor, width: int) -> Tensor: ...


@dataclass(frozen=True)
class TensorParallel:
    """rank in [0, size). group: a torch.distributed ProcessGroup of `size` members; None at size 1, and in tests.

    sum_few, sum_norm, gather: what is done to tensors that they take, on all ranks or on none.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    sum_few: Sum | None = None
    sum_norm: NormedSum | None = None
    gather: Gather | None = None

    def shard(self, total: int, what: str) -> int:
        """The part of `total` that one rank holds; ValueError names `what` if it does not divide."""
        if total % self.size:
            raise ValueError(
                f"{what} = {total} cannot be divided among {self.size} tensor-parallel ranks; choose another "
                "tensor_parallel_size"
            )
        return total // self.size

    def part(self, total: int, what: str) -> range:
        """Which of `total` equal things this rank holds; ValueError as in `shard`."""
        count = self.shard(total, what)
        return range(self.rank * count, (self.rank + 1) * count)

    def kv_heads(self, num_kv_heads: int) -> range:
        """Which key/value heads this rank holds. Where there are fewer heads than ranks, several ranks hold the same.

        Query heads are dealt out in order, so those of a rank share the key/value heads that it holds.
        """
        if num_kv_heads >= self.size:
            return self.part(num_kv_heads, "num_key_value_heads")
        if self.size % num_kv_heads:
            raise ValueError(
                f"num_key_value_heads = {num_kv_heads} can neither be divided among {self.size} tensor-parallel ranks "
                "nor shared by equally many of them; choose another tensor_parallel_size"
            )
        head = self.rank * num_kv_heads // self.size
        return range(head, head + 1)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, the same bits on each. x may be overwritten."""
        if self.sum_few is not None and self.sum_few.takes(x):
            return self.sum_few(x)
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor, width: int) -> Tensor:
        """The ranks' x [num_rows, n] side by side, cut to [num_rows, width], contiguous; valid until the call after the
        next one."""
        if self.gather is not None and self.gather.takes(x, width):
            return self.gather(x, width)
        if self.size == 1:
            return x
        parts = torch.empty(self.size * x.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
        _all_gather(parts, x.contiguous(), group=self.group)
        pieces = parts.view(self.size, *x.shape)
        return torch.cat([piece[:, : max(0, width - i * x.shape[1])] for i, piece in enumerate(pieces)], dim=1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, written into every other rank's."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=0)
        return x

    def smallest(self, number: int, device: torch.device) -> int:
        """The smallest of the ranks' numbers. device: where this rank computes."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number, dtype=torch.int64, device=device)
        dist.all_reduce(numbers, dist.ReduceOp.MIN, group=self.group)
        return int(numbers.item())
