"""Mamba-2 (Dao and Gu, 2024): a state for each head that fades by one number a token.

Owns its meaning. Of each token come, after a causal convolution with SiLU, an input x for each head and, for each group
of heads, two vectors b and c; its step dt > 0 is softplus(dt + dt_bias). With the state S [state_dim, head_dim]:

    S = exp(-decay dt) S + dt b x        out = norm((c S + skip x) * silu(z))

The norm is over the heads of a group together. Invariant: states are float32, and so is what is added to them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.causal_conv import conv_silu_reference, pass_states
from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.state_types import LayerState, StepStates


@dataclass(frozen=True)
class Mamba2:
    """The weights of one layer, for the heads of this rank.

    conv_weight [width, channels], conv_bias [channels] in the model's dtype, of x, b and c side by side. decay,
    dt_bias, skip [num_heads] float32. norm_weight [num_heads * head_dim] in the model's dtype; None leaves the norm to
    the caller.
    """

    conv_weight: Tensor
    conv_bias: Tensor | None
    decay: Tensor
    dt_bias: Tensor
    skip: Tensor
    norm_weight: Tensor | None
    eps: float
    num_groups: int
    state_dim: int

    @property
    def num_heads(self) -> int:
        return self.decay.shape[0]

    @property
    def num_values(self) -> int:
        """Numbers of all heads."""
        return self.conv_weight.shape[1] - 2 * self.num_groups * self.state_dim

    @property
    def head_dim(self) -> int:
        return self.num_values // self.num_heads


def mamba2(
    zxbcdt: Tensor,
    net: Mamba2,
    state: LayerState,
    step: StepStates,
    *,
    is_exact: bool = False,
    semaphores: Tensor | None = None,
) -> Tensor:
    """zxbcdt [num_tokens, num_values + channels + num_heads] -> [num_tokens, num_values]. state is advanced.

    is_exact: token after token, so that the bits do not depend on how prompts are cut, nor on what else is in the step.
    semaphores: counters for a GPU, where the caller keeps some (`skinny_gemm.new_semaphores`).
    """
    if use_triton(zxbcdt):
        from nanovllm.kernels.triton.mamba2 import mamba2_triton

        return mamba2_triton(zxbcdt, net, state, step, is_exact or step.at_any_token, semaphores)
    return mamba2_reference(zxbcdt, net, state, step)


def mamba2_reference(zxbcdt: Tensor, net: Mamba2, state: LayerState, step: StepStates) -> Tensor:
    z, xbc, dt = zxbcdt.split([net.num_values, net.conv_weight.shape[1], net.num_heads], dim=1)
    mixed = conv_silu_reference(xbc, net.conv_weight, net.conv_bias, state.conv, step)
    x, b, c, dt = heads(mixed, dt, net)
    alpha, out = torch.exp(-net.decay * dt), torch.empty_like(x)

    def follow(t: int, matrix: Tensor) -> Tensor:
        new = (dt[t, :, None] * b[t]).unsqueeze(-1) * x[t].unsqueeze(-2)
        matrix = alpha[t, :, None, None] * matrix + new
        out[t] = torch.einsum("hn,hnp->hp", c[t], matrix) + net.skip[:, None] * x[t]
        return matrix

    pass_states(state.matrices, len(x), step, follow)
    return gated_norm(out.flatten(1), z, net)


def heads(mixed: Tensor, dt: Tensor, net: Mamba2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [num_tokens, num_heads, head_dim], b and c [num_tokens, num_heads, state_dim], dt [num_tokens, num_heads], all
    float32.
    """
    size = net.num_groups * net.state_dim
    x, b, c = mixed.float().split([net.num_values, size, size], dim=1)
    b, c = (part.unflatten(1, (net.num_groups, net.state_dim)) for part in (b, c))
    b, c = (part.repeat_interleave(net.num_heads // net.num_groups, dim=1) for part in (b, c))
    return x.unflatten(1, (net.num_heads, net.head_dim)), b, c, F.softplus(dt.float() + net.dt_bias)


def gated_norm(out: Tensor, z: Tensor, net: Mamba2) -> Tensor:
    """out [num_tokens, num_values] float32 -> the same shape, in z's dtype."""
    gated = out * F.silu(z.float())
    if net.norm_weight is None:
        return gated.to(z.dtype)
    groups = gated.unflatten(1, (net.num_groups, -1))
    normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + net.eps)
    return normed.flatten(1).to(z.dtype) * net.norm_weight
