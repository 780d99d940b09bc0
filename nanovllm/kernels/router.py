"""The router of a mixture of experts with the norm before it: a token's experts, from the residual stream.

Owns the meaning: it equals norm, product and `routing.route` in sequence, and rounds where they round. On a GPU it is
one kernel for one token (`triton/router.py`). Invariant: pure, no input is ever written.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from nanovllm.kernels.routing import Routing, route, route_reference
from nanovllm.kernels.skinny_linear import skinny_linear


class Router(NamedTuple):
    """weight [num_experts, hidden] and bias [num_experts] or None, of one dtype, that of hidden states or float32.

    correction: `route`'s bias.
    """

    weight: Tensor
    bias: Tensor | None
    correction: Tensor | None
    routing: Routing


def rms_norm_route(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, router: Router, semaphores: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(norm of x + residual, x + residual, weights, expert_ids): see `rms_norm.add_rms_norm` and `routing.route`.

    semaphores: `skinny_gemm.new_semaphores`'s, where the caller keeps some; the one kernel needs them.
    """
    if use_triton(x) and semaphores is not None:
        from nanovllm.kernels.triton.router import rms_norm_route_triton, takes

        if takes(x, router):
            return rms_norm_route_triton(x, residual, norm_weight, eps, router, semaphores)
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    logits = skinny_linear(normed.to(router.weight.dtype), router.weight, router.bias, semaphores)
    return normed, total, *route(logits, router.correction, router.routing)


def rms_norm_route_reference(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, router: Router
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed, total = add_rms_norm_reference(x, residual, norm_weight, eps)
    logits = F.linear(normed.to(router.weight.dtype), router.weight, router.bias)
    return normed, total, *route_reference(logits, router.correction, router.routing)
