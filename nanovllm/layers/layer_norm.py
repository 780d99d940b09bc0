"""LayerNorm (Ba et al., 2016) in the place of an RMSNorm, with or without a bias.

Owns its weights. Invariant: it is called as every norm of `norm.py` is. It tells products of no weight, so that none of
them takes it for the RMS norm that their kernels compute.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpecs, parameter_spec
from nanovllm.model_config import ModelConfig


class LayerNorm(nn.Module):
    weight = None  # what a fused product would read: see `linear_method.Norm`

    def __init__(self, size: int, eps: float, has_bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False) if has_bias else None
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); without a residual, x itself starts the residual stream."""
        total = x if residual is None else x + residual
        return F.layer_norm(total, self.gain.shape, self.gain, self.bias, self.eps), total

    def weights(self, name: str) -> WeightSpecs:
        yield parameter_spec(f"{name}.weight", self.gain)
        if self.bias is not None:
            yield parameter_spec(f"{name}.bias", self.bias)


def with_bias(config: ModelConfig, dtype: torch.dtype, ops: Ops) -> LayerNorm:
    """A model's norm of hidden states."""
    return LayerNorm(config.hidden_size, config.rms_norm_eps, True, dtype)


def without_bias(config: ModelConfig, dtype: torch.dtype, ops: Ops) -> LayerNorm:
    """The same."""
    return LayerNorm(config.hidden_size, config.rms_norm_eps, False, dtype)
