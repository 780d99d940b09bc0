"""RMSNorm as a layer: a weight, and the operation with or without the residual addition before it.

Owns the norm's weight. Invariant: every kind of norm here is called in the same way, so a decoder layer need not know
which one it has.
"""

import torch
from torch import Tensor, nn

from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpec, WeightSpecs, parameter_spec


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019).

    offset: added to the checkpoint's weight once, when it is loaded. Such a weight is kept in float32, in which its
    family adds the offset: near 1, bfloat16 would lose most of what the checkpoint says.
    """

    def __init__(self, size: int, eps: float, dtype: torch.dtype, ops: Ops, offset: float = 0.0) -> None:
        super().__init__()
        kept = torch.float32 if offset else dtype
        self.weight = nn.Parameter(torch.empty(size, dtype=kept), requires_grad=False)
        self.eps = eps
        self.ops = ops
        self.offset = offset

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); without a residual, x itself starts the residual stream."""
        if residual is None:
            return self.ops.rms_norm(x, self.weight, self.eps), x
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)

    def weights(self, name: str) -> WeightSpecs:
        if self.offset:
            weight, offset = self.weight.data, self.offset
            fill = lambda tensor: weight.copy_(tensor[:]).add_(offset)  # noqa: E731
            yield f"{name}.weight", WeightSpec(tuple(weight.shape), fill)
        else:
            yield parameter_spec(f"{name}.weight", self.weight)


class NoNorm(nn.Module):
    """What stands where a family has no norm: the residual addition alone."""

    weight = None
    eps = 0.0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x + residual, x + residual)"""
        total = x if residual is None else x + residual
        return total, total

    def weights(self, name: str) -> WeightSpecs:
        yield from ()
