"""RMSNorm as a layer: a weight, and the operation with or without the residual addition before it."""

import torch
from torch import Tensor, nn

from nanovllm.kernels.ops import Ops
from nanovllm.layers.slots import Slots, parameter_slot


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); without a residual, x itself starts the residual stream."""
        if residual is None:
            return self.ops.rms_norm(x, self.weight, self.eps), x
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)

    def slots(self, name: str) -> Slots:
        yield parameter_slot(f"{name}.weight", self.weight)
