"""Kimi delta attention (KDA; Kimi Team, 2025): a gated delta net that forgets number by number of a key.

Owns its meaning. As in `delta_net.py`, of each token come, after a causal convolution with SiLU, a query and a key of
unit length and a value; but alpha, how much stays, is a number for each row of the matrix S [key_dim, value_dim]:

    S = diag(alpha) S + beta k (v - k diag(alpha) S)        out = norm(q S / sqrt(key_dim)) * sigmoid(z)

Invariant: matrices are float32, and so is what is added to them, and the norm.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.causal_conv import conv_silu_reference
from nanovllm.kernels.delta_net import L2_EPS, advance
from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.state_types import LayerState, StepStates


@dataclass(frozen=True)
class KimiDelta:
    """The weights of one layer, for the heads of this rank, whose keys are as wide as their values.

    conv_weight [width, 3 * num_heads * head_dim] in the model's dtype, of queries, keys and values side by side. decay
    [num_heads], dt_bias [num_heads * head_dim] float32: alpha = exp(-decay softplus(f + dt_bias)). norm_weight
    [head_dim] in the model's dtype.
    """

    conv_weight: Tensor
    decay: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    eps: float

    @property
    def num_heads(self) -> int:
        return self.decay.shape[0]

    @property
    def head_dim(self) -> int:
        return self.norm_weight.shape[0]


def kimi_delta(
    qkv: Tensor,
    f: Tensor,
    b: Tensor,
    z: Tensor,
    net: KimiDelta,
    state: LayerState,
    step: StepStates,
    *,
    is_exact: bool = False,
) -> Tensor:
    """qkv [num_tokens, 3 * values], f and z [num_tokens, values], b [num_tokens, num_heads] -> [num_tokens, values].

    values: num_heads times head_dim. Numbers of a token are contiguous. state is advanced. is_exact: token after token,
    so that the bits do not depend on how prompts are cut, nor on what else is in the step.
    """
    if use_triton(qkv):
        from nanovllm.kernels.triton.kimi_delta import kimi_delta_triton

        return kimi_delta_triton(qkv, f, b, z, net, state, step, is_exact or step.at_any_token)
    return kimi_delta_reference(qkv, f, b, z, net, state, step)


def kimi_delta_reference(
    qkv: Tensor, f: Tensor, b: Tensor, z: Tensor, net: KimiDelta, state: LayerState, step: StepStates
) -> Tensor:
    heads = net.num_heads, net.head_dim
    mixed = conv_silu_reference(qkv, net.conv_weight, None, state.conv, step).float()
    q, k, v = (part.unflatten(1, heads) for part in mixed.chunk(3, dim=1))
    q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + L2_EPS) for part in (q, k))
    alpha = torch.exp(-net.decay[:, None] * F.softplus(f.float() + net.dt_bias).unflatten(1, heads))
    out = advance(q * net.head_dim**-0.5, k, v, alpha, b.float().sigmoid(), state, step)
    return gated_norm(out.flatten(1).to(qkv.dtype), z, net)


def gated_norm(out: Tensor, z: Tensor, net: KimiDelta) -> Tensor:
    """out, z [num_tokens, values] -> the same."""
    heads = out.float().unflatten(1, (net.num_heads, net.head_dim))
    normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + net.eps) * net.norm_weight.float()
    return (normed.flatten(1) * z.float().sigmoid()).to(out.dtype)
