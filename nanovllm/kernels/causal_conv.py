"""Causal convolutions of each channel by itself, over a request's tokens, with the last inputs kept as its state.

Owns the meaning: y[t] = bias + sum_j weight[j] x[t - width + 1 + j], where inputs before the first token are zeros.
`short_conv` gates input and output (LFM2; Liquid AI, 2025); `conv_silu` has SiLU behind it (Mamba; Gu and Dao, 2023).
Invariant: each token is computed from the same numbers in the same order, however its prompt is cut into steps.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.state_types import StepStates


def short_conv(bcx: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, step: StepStates) -> Tensor:
    """bcx [num_tokens, 3 * channels]: of each token b, c and x -> c * convolution(b * x), [num_tokens, channels].

    weight [width, channels], bias [channels] in the dtype of bcx; state: `LayerState.conv`, which is advanced.
    """
    if use_triton(bcx):
        from nanovllm.kernels.triton.causal_conv import causal_conv_triton

        return causal_conv_triton(bcx, weight, bias, state, step, is_gated=True)
    return short_conv_reference(bcx, weight, bias, state, step)


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, step: StepStates) -> Tensor:
    """x [num_tokens, channels] with any stride between tokens -> silu(convolution(x)); else as `short_conv`."""
    if use_triton(x):
        from nanovllm.kernels.triton.causal_conv import causal_conv_triton

        return causal_conv_triton(x, weight, bias, state, step, is_gated=False)
    return conv_silu_reference(x, weight, bias, state, step)


def short_conv_reference(bcx: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, step: StepStates) -> Tensor:
    b, c, x = bcx.chunk(3, dim=-1)
    return c * _convolve(b * x, weight, bias, state, step).to(bcx.dtype)


def conv_silu_reference(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, step: StepStates) -> Tensor:
    return F.silu(_convolve(x, weight, bias, state, step)).to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, step: StepStates) -> Tensor:
    """[num_tokens, channels] float32."""
    inputs = _inputs(x, state, step)
    keep_states(state, inputs[:, 1:], step)
    y = (inputs * weight.float()).sum(1)
    return y if bias is None else y + bias.float()


def _inputs(x: Tensor, state: Tensor, step: StepStates) -> Tensor:
    """Of each token, the inputs that its output is made of, oldest first: [num_tokens, width, channels] float32."""
    starts, width = step.meta.query_start_loc, state.shape[1] + 1
    lens = starts[1:] - starts[:-1]
    request = torch.repeat_interleave(lens, output_size=x.shape[0])
    had_tokens = step.meta.seq_lens > lens
    before = torch.where(had_tokens[:, None, None], state[step.rows.clamp(min=0)], 0.0)  # [n, width - 1, channels]
    token = torch.arange(x.shape[0], device=x.device)[:, None] + torch.arange(1 - width, 1, device=x.device)
    offset = token - starts[request][:, None]  # in the step; negative: before it
    in_state = before[request[:, None], (offset + width - 1).clamp(0, width - 2)]
    return torch.where((offset >= 0).unsqueeze(-1), x.float()[token.clamp(min=0)], in_state)


def pass_states(states: Tensor, num_tokens: int, step: StepStates, follow: Callable[[int, Tensor], Tensor]) -> None:
    """Take each request's state through its tokens. follow: of a token and the state before it, the state behind it."""
    after, starts = torch.empty(num_tokens, *states.shape[1:]), step.meta.query_start_loc.tolist()
    for request, (row, seq_len) in enumerate(zip(step.rows.tolist(), step.meta.seq_lens.tolist(), strict=True)):
        start, end = starts[request : request + 2]
        state = states[row] if seq_len > end - start else torch.zeros_like(states[row])
        for token in range(start, end):
            state = after[token] = follow(token, state)
    keep_states(states, after, step)


def keep_states(state: Tensor, after: Tensor, step: StepStates) -> None:
    """after [num_tokens, ...]: the state behind each token, of which those of requests' ends and snapshots stay."""
    ends = step.meta.query_start_loc[1:] - 1
    is_real = step.rows >= 0
    state[step.rows[is_real]] = after[ends[is_real]]
    is_kept = step.snapshots >= 0
    state[step.snapshots[is_kept]] = after[is_kept]
