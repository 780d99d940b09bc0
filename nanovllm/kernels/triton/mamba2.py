"""Mamba-2 in Triton: decodes in one launch, and prompts.

Owns how it runs on a GPU. Of a decode, a program has some columns of one head's state: it convolves, updates them,
which are read and written once, and gates. Whoever is the last of a group of heads norms them, and moves on the
convolution of what they share. Prompts go through their states in `mamba2_chunks.py`. Invariant: either way
the state is that of all tokens, float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.mamba2 import Mamba2
from nanovllm.kernels.state_types import LayerState, StepStates
from nanovllm.kernels.triton.causal_conv import advance, causal_conv_triton, convolved
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.common.state_steps import behind_decodes, counters
from nanovllm.kernels.triton.mamba2_chunks import mamba2_chunks_triton
from nanovllm.kernels.triton.state_parts import softplus

COLUMNS = 32  # of a state: 128 bytes of a row


@triton.jit
def _decode_kernel(
    zxbcdt_ptr,
    conv_weight_ptr,
    conv_bias_ptr,
    decay_ptr,
    dt_bias_ptr,
    skip_ptr,
    norm_ptr,
    conv_ptr,
    matrices_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    snapshots_ptr,
    gated_ptr,
    counters_ptr,
    out_ptr,
    stride,
    conv_stride,
    matrix_stride,
    eps,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    STATE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    VALUES: tl.constexpr = HEADS * DIM
    CHANNELS: tl.constexpr = VALUES + 2 * GROUPS * STATE
    SHARED_BY: tl.constexpr = HEADS // GROUPS
    request, head = tl.program_id(0), tl.program_id(1) // PARTS
    row = tl.load(rows_ptr + request).to(tl.int64)
    token = tl.load(starts_ptr + request).to(tl.int64)
    length = tl.load(starts_ptr + request + 1) - token
    dim = tl.program_id(1) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    is_dim = dim < DIM
    dtype = out_ptr.dtype.element_ty
    result = out_ptr + token * VALUES + head * DIM + dim
    if (row < 0) | (length == 0):  # padding: what its tokens are must be numbers
        tl.store(result, tl.zeros((COLUMNS,), dtype), mask=is_dim & (length > 0))
        return
    had_tokens = tl.load(seq_lens_ptr + request) > 1
    snapshot = tl.load(snapshots_ptr + token).to(tl.int64)
    group = head // SHARED_BY
    z_ptr = zxbcdt_ptr + token * stride
    x_ptr = z_ptr + VALUES
    conv = conv_ptr + row * conv_stride
    number = tl.arange(0, BLOCK_STATE)
    is_number = number < STATE
    cell = (head * STATE + number[:, None]) * DIM + dim[None, :]
    is_cell = is_number[:, None] & is_dim[None, :]
    matrix = tl.load(matrices_ptr + row * matrix_stride + cell, mask=is_cell & had_tokens, other=0.0)
    x_channel, b_channel = head * DIM + dim, VALUES + group * STATE + number
    c_channel = b_channel + GROUPS * STATE
    x = convolved(x_ptr, conv_weight_ptr, conv_bias_ptr, conv, had_tokens, x_channel, is_dim, CHANNELS, WIDTH, HAS_BIAS)
    b = convolved(
        x_ptr, conv_weight_ptr, conv_bias_ptr, conv, had_tokens, b_channel, is_number, CHANNELS, WIDTH, HAS_BIAS
    )
    c = convolved(
        x_ptr, conv_weight_ptr, conv_bias_ptr, conv, had_tokens, c_channel, is_number, CHANNELS, WIDTH, HAS_BIAS
    )
    advance(x_ptr, conv_ptr, conv_stride, row, snapshot, had_tokens, x_channel, is_dim, CHANNELS, WIDTH)
    dt = softplus(tl.load(x_ptr + CHANNELS + head).to(tl.float32) + tl.load(dt_bias_ptr + head))
    matrix = tl.exp(-tl.load(decay_ptr + head) * dt) * matrix + (dt * b)[:, None] * x[None, :]
    tl.store(matrices_ptr + row * matrix_stride + cell, matrix, mask=is_cell)
    tl.store(matrices_ptr + snapshot * matrix_stride + cell, matrix, mask=is_cell & (snapshot >= 0))
    z = tl.load(z_ptr + head * DIM + dim, mask=is_dim, other=0.0).to(tl.float32)
    y = (tl.sum(c[:, None] * matrix, 0) + tl.load(skip_ptr + head) * x) * (z / (1.0 + tl.exp(-z)))
    if HAS_NORM:
        tl.store(gated_ptr + request * VALUES + head * DIM + dim, y, mask=is_dim)
    else:
        tl.store(result, y.to(dtype), mask=is_dim)
    tl.debug_barrier()  # every warp's loads and stores come before the one thread's release
    counter = counters_ptr + request * GROUPS + group
    if tl.atomic_add(counter, 1, sem="acq_rel") == SHARED_BY * PARTS - 1:
        tl.store(counter, 0)
        advance(x_ptr, conv_ptr, conv_stride, row, snapshot, had_tokens, b_channel, is_number, CHANNELS, WIDTH)
        advance(x_ptr, conv_ptr, conv_stride, row, snapshot, had_tokens, c_channel, is_number, CHANNELS, WIDTH)
        if HAS_NORM:
            place = tl.arange(0, BLOCK_GROUP)
            is_here = place < SHARED_BY * DIM
            value = group * SHARED_BY * DIM + place
            # .cg reads past this multiprocessor's L1 cache.
            normed = tl.load(gated_ptr + request * VALUES + value, mask=is_here, other=0.0, cache_modifier=".cg")
            normed = (normed * tl.rsqrt(tl.sum(normed * normed, 0) / (SHARED_BY * DIM) + eps)).to(dtype).to(tl.float32)
            normed *= tl.load(norm_ptr + value, mask=is_here, other=0.0).to(tl.float32)
            tl.store(out_ptr + token * VALUES + value, normed.to(dtype), mask=is_here)


def mamba2_triton(
    zxbcdt: Tensor, net: Mamba2, state: LayerState, step: StepStates, is_exact: bool, semaphores: Tensor | None = None
) -> Tensor:
    """See `mamba2.mamba2`."""
    num_decodes = 0 if is_exact else step.meta.num_decodes
    out = zxbcdt.new_empty(zxbcdt.shape[0], net.num_values)
    if num_decodes:
        _decode(zxbcdt, net, state, step, num_decodes, out, semaphores)
    if num_decodes < step.meta.num_reqs and len(out):
        rest, channels = behind_decodes(step, num_decodes), net.conv_weight.shape[1]
        xbc = zxbcdt[:, net.num_values : net.num_values + channels]
        mixed = causal_conv_triton(xbc, net.conv_weight, net.conv_bias, state.conv, rest, is_gated=False)
        mamba2_chunks_triton(mixed, zxbcdt, net, state.matrices, rest, out, num_decodes, is_exact)
    return out


def _decode(
    zxbcdt: Tensor,
    net: Mamba2,
    state: LayerState,
    step: StepStates,
    num_reqs: int,
    out: Tensor,
    semaphores: Tensor | None,
) -> None:
    block_state, columns = next_power_of_2(net.state_dim), min(COLUMNS, next_power_of_2(net.head_dim))
    parts = cdiv(net.head_dim, columns)
    gated = None if net.norm_weight is None else zxbcdt.new_empty(num_reqs, net.num_values, dtype=torch.float32)
    launch(
        _decode_kernel, (num_reqs, net.num_heads * parts), zxbcdt.device,
        zxbcdt, net.conv_weight, net.conv_bias, net.decay, net.dt_bias, net.skip, net.norm_weight, state.conv,
        state.matrices, step.rows, step.meta.query_start_loc, step.meta.seq_lens, step.snapshots, gated,
        counters(num_reqs * net.num_groups, zxbcdt.device, semaphores), out,
        zxbcdt.stride(0), state.conv.stride(0), state.matrices.stride(0), net.eps,
        GROUPS=net.num_groups, HEADS=net.num_heads, STATE=net.state_dim, DIM=net.head_dim,
        WIDTH=net.conv_weight.shape[0], HAS_BIAS=net.conv_bias is not None, HAS_NORM=net.norm_weight is not None,
        BLOCK_STATE=block_state, BLOCK_GROUP=next_power_of_2(net.num_values // net.num_groups),
        COLUMNS=columns, PARTS=parts, num_warps=4,
    )  # fmt: skip
