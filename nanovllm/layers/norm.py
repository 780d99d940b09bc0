"""RMSNorm as a layer: a weight, and the two forms of the operation in `kernels/rms_norm.py`."""

import torch
from torch import Tensor, nn

from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm
from nanovllm.layers.slots import Slots, parameter_slot


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); without a residual, x itself starts the residual stream."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)

    def slots(self, name: str) -> Slots:
        yield parameter_slot(f"{name}.weight", self.weight)
