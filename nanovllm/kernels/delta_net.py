"""The gated delta net (Yang et al., 2025): a matrix for each head that takes the place of all keys and values.

Owns its meaning. Of each token come, after a causal convolution with SiLU, a query and a key of unit length and a
value; of its two gates alpha is how much of the matrix S [key_dim, value_dim] stays, beta how far it turns to the new:

    S = alpha S + beta k (v - alpha k S)        out = norm(q S / sqrt(key_dim)) * silu(z)

Consecutive value heads share a query and key head. Invariant: matrices are float32, and so is what is added to them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.causal_conv import conv_silu_reference, pass_states
from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.state_types import LayerState, StepStates

L2_EPS = 1e-6
# Tokens that a GPU takes at once of a prompt; at multiples of it a state can be kept. A Hopper GPU would multiply tiles
# with 64 rows by wgmma; of several that depend on each other in a loop, ptxas of CUDA 12.8 to 13.0 makes wrong code:
# illegal accesses, and worse, none (https://github.com/triton-lang/triton/issues/11366).
CHUNK = 32


@dataclass(frozen=True)
class DeltaNet:
    """The weights of one layer, for the heads of this rank.

    conv_weight [width, channels] in the model's dtype, of queries, keys and values side by side. decay, dt_bias
    [num_value_heads] float32: alpha = exp(-decay softplus(a + dt_bias)). norm_weight [value_dim] in the model's dtype.
    """

    conv_weight: Tensor
    decay: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    eps: float
    num_key_heads: int

    @property
    def num_value_heads(self) -> int:
        return self.decay.shape[0]

    @property
    def value_dim(self) -> int:
        return self.norm_weight.shape[0]

    @property
    def key_dim(self) -> int:
        num_values = self.num_value_heads * self.value_dim
        return (self.conv_weight.shape[1] - num_values) // (2 * self.num_key_heads)


def delta_net(
    qkvz: Tensor,
    ba: Tensor,
    net: DeltaNet,
    state: LayerState,
    step: StepStates,
    *,
    is_exact: bool = False,
    semaphores: Tensor | None = None,
) -> Tensor:
    """qkvz [num_tokens, channels + values], ba [num_tokens, 2 * num_value_heads] -> [num_tokens, values].

    values: value heads, times their size. state is advanced. is_exact: token after token, so that the bits do not
    depend on how prompts are cut, nor on what else is in the step. semaphores: counters for a GPU, where the caller
    keeps some (`skinny_gemm.new_semaphores`).
    """
    if use_triton(qkvz):
        from nanovllm.kernels.triton.delta_net import delta_net_triton

        return delta_net_triton(qkvz, ba, net, state, step, is_exact or step.at_any_token, semaphores)
    return delta_net_reference(qkvz, ba, net, state, step)


def delta_net_reference(qkvz: Tensor, ba: Tensor, net: DeltaNet, state: LayerState, step: StepStates) -> Tensor:
    mixed, z = qkvz.split([net.conv_weight.shape[1], net.num_value_heads * net.value_dim], dim=1)
    mixed = conv_silu_reference(mixed, net.conv_weight, None, state.conv, step)
    q, k, v, alpha, beta = heads(mixed, ba, net)
    out = advance(q, k, v, alpha.unsqueeze(-1), beta, state, step)
    return gated_norm(out.to(qkvz.dtype), z, net)


def advance(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: LayerState, step: StepStates
) -> Tensor:
    """The rule itself, token after token: q S of each, like v. alpha [num_tokens, num_value_heads, 1 or key_dim]."""
    out = torch.empty_like(v)

    def follow(t: int, matrix: Tensor) -> Tensor:
        matrix = alpha[t].unsqueeze(-1) * matrix
        change = beta[t, :, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], matrix))
        matrix = matrix + k[t].unsqueeze(-1) * change.unsqueeze(-2)
        out[t] = torch.einsum("hk,hkv->hv", q[t], matrix)
        return matrix

    pass_states(state.matrices, len(v), step, follow)
    return out


def heads(mixed: Tensor, ba: Tensor, net: DeltaNet) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k [num_tokens, num_value_heads, key_dim], v [num_tokens, num_value_heads, value_dim], alpha and beta
    [num_tokens, num_value_heads], all float32.
    """
    keys = net.num_key_heads * net.key_dim
    q, k, v = (part.float() for part in mixed.split([keys, keys, mixed.shape[1] - 2 * keys], dim=1))
    q, k = (part.unflatten(1, (net.num_key_heads, net.key_dim)) for part in (q, k))
    q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + L2_EPS) for part in (q, k))
    q, k = (part.repeat_interleave(net.num_value_heads // net.num_key_heads, dim=1) for part in (q, k))
    b, a = ba.float().chunk(2, dim=1)
    alpha = torch.exp(-net.decay * F.softplus(a + net.dt_bias))
    return q * net.key_dim**-0.5, k, v.unflatten(1, (net.num_value_heads, -1)), alpha, b.sigmoid()


def gated_norm(out: Tensor, z: Tensor, net: DeltaNet) -> Tensor:
    """out [num_tokens, num_value_heads, value_dim] -> [num_tokens, values]."""
    normed = rms_norm_reference(out, net.norm_weight, net.eps)
    return (normed * F.silu(z.float()).view_as(normed)).to(out.dtype).flatten(1)
