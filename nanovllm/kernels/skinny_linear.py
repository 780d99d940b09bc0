"""Skinny linear: products of the few rows of a decode step (GEMV, skinny GEMM), norm and gate fused.

Owns the meaning of the fused forms: each equals the plain operations in sequence and rounds where they round. On a GPU
they run as one kernel where that is faster (`triton/linear/skinny_linear.py`) and as the plain operations elsewhere, so
a model can be written with them alone. Invariant: pure, no input is ever written.

What is repeatable: a row's result depends on that row, and on the sizes, dtypes, strides and number of rows, which pick
the kernel. It does not depend on the other rows, nor on timing: where a sum is split, its parts are added in a fixed
order.
"""

import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from nanovllm.kernels.silu_and_mul import GATES, REFERENCE_GATES


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, semaphores: Tensor | None = None) -> Tensor:
    """x W^T + b. x [num_rows, in_features], weight [out_features, in_features] -> [num_rows, out_features].

    Any number of rows; a few are what it is made for. Rows of x may be strided. semaphores: for split-K on a GPU,
    where the caller keeps some (`skinny_gemm.new_semaphores`).
    """
    if use_triton(x):
        from nanovllm.kernels.triton.linear.skinny_linear import choose, skinny_linear_triton

        config = choose(x, weight)
        if config is not None:
            return skinny_linear_triton(x, weight, bias, config, semaphores=semaphores)
    return F.linear(x, weight, bias)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    semaphores: Tensor | None = None,
) -> Tensor:
    """silu_and_mul(x W^T + b), or gelu_and_mul for activation "gelu_tanh".

    weight [2 * intermediate, in_features], gate first -> [num_rows, intermediate].
    """
    if use_triton(x):
        from nanovllm.kernels.triton.linear.skinny_linear import choose, skinny_linear_triton

        config = choose(x, weight, gated=True)
        if config is not None:
            gelu = activation == "gelu_tanh"
            return skinny_linear_triton(x, weight, bias, config, gated=True, gelu=gelu, semaphores=semaphores)
    return GATES[activation](F.linear(x, weight, bias))


def rms_norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    semaphores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(skinny_linear(rms_norm(x + residual)), x + residual); without a residual, the second is x itself.

    x, residual [num_rows, in_features], norm_weight [in_features]; the rest as in `skinny_linear`.
    """
    if use_triton(x):
        from nanovllm.kernels.triton.linear.skinny_linear import choose, rms_norm_linear_triton

        config = choose(x, weight, normed=True)
        if config is not None:
            return rms_norm_linear_triton(x, residual, norm_weight, eps, weight, bias, config, semaphores=semaphores)
    normed, total = _norm(x, residual, norm_weight, eps)
    return skinny_linear(normed, weight, bias, semaphores), total


def rms_norm_gated_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    semaphores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(gated_linear(rms_norm(x + residual)), x + residual): see `rms_norm_linear` and `gated_linear`."""
    if use_triton(x):
        from nanovllm.kernels.triton.linear.skinny_linear import choose, rms_norm_linear_triton

        config = choose(x, weight, gated=True, normed=True)
        if config is not None:
            gelu = activation == "gelu_tanh"
            return rms_norm_linear_triton(
                x, residual, norm_weight, eps, weight, bias, config, gated=True, gelu=gelu, semaphores=semaphores
            )
    normed, total = _norm(x, residual, norm_weight, eps)
    return gated_linear(normed, weight, bias, activation, semaphores), total


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if residual is None:
        return rms_norm(x, weight, eps), x
    return add_rms_norm(x, residual, weight, eps)


def gated_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "silu") -> Tensor:
    return REFERENCE_GATES[activation](F.linear(x, weight, bias))


def rms_norm_linear_reference(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if residual is None:
        return F.linear(rms_norm_reference(x, norm_weight, eps), weight, bias), x
    normed, total = add_rms_norm_reference(x, residual, norm_weight, eps)
    return F.linear(normed, weight, bias), total


def rms_norm_gated_linear_reference(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    gate_up, total = rms_norm_linear_reference(x, residual, norm_weight, eps, weight, bias)
    return REFERENCE_GATES[activation](gate_up), total
