"""ShardedRMSNorm: a norm over all heads of a token together, where each tensor-parallel rank holds some of them.

Owns the rank's part of the weight. Invariant: one rank alone computes what `RMSNorm` does.
"""

import torch
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpecs, part_spec


class ShardedRMSNorm(RMSNorm):
    """Norm over all heads of a token together, of which this rank holds some: the mean square is that of all ranks."""

    def __init__(
        self, num_heads: int, held: range, head_dim: int, eps: float, dtype: torch.dtype, tp: TensorParallel, ops: Ops
    ) -> None:
        """held: the heads of this rank; a head that ranks share is held equally often as any other."""
        super().__init__(len(held) * head_dim, eps, dtype, ops)
        self.tp = tp
        self.size = num_heads * head_dim
        self.first = held.start * head_dim

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See RMSNorm; never with a residual."""
        if self.tp.size == 1:
            return super().forward(x)
        values = x.float()
        mean = self.tp.all_reduce(values.square().mean(-1, keepdim=True)) / self.tp.size
        return (values * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.weight, x

    def weights(self, name: str) -> WeightSpecs:
        held = range(self.first, self.first + self.weight.shape[0])
        yield part_spec(f"{name}.weight", self.weight, self.size, held)
