"""Root-mean-square norm (Zhang and Sennrich, 2019), alone and with the residual addition before it.

Owns the meaning and its rounding: mean in float32, normalised value rounded to the input's dtype, then times the
weight, as Hugging Face's Llama and Qwen3 do. Invariant: pure, no input is ever written, in any dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., dim] with any strides, weight [dim] of x's dtype or float32 -> a new tensor [..., dim] of x's dtype."""
    if use_triton(x):
        from nanovllm.kernels.triton.rms_norm import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    return _rms_norm_by_layer_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [num_tokens, dim] -> (rms_norm(x + residual), x + residual), both new; the sum is rounded first."""
    if use_triton(x):
        from nanovllm.kernels.triton.rms_norm import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps)
    total = x + residual
    return _rms_norm_by_layer_norm(total, weight, eps), total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    values = x.float()
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return ((values * scale).to(x.dtype) * weight).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


def _rms_norm_by_layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The CPU path. x beside -x has mean 0 and the variance that RMS norm wants, so the fused layer norm applies: half
    the time of the reference's eight operations."""
    dim = x.shape[-1]
    return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * dim,), eps=eps)[..., :dim].mul(weight).to(x.dtype)
