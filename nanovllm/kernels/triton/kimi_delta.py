"""Kimi delta attention in Triton: token after token in one launch, and prompts in chunks.

Owns how it runs on a GPU: a program has a head of one request, convolves, updates its matrix, which is read and written
once a token, and norms. Prompts go through their matrices in chunks (`kimi_chunks.py`), or the same way where bits must
not depend on how they are cut. Invariant: either way the state is that of all tokens, float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.delta_net import L2_EPS
from nanovllm.kernels.kimi_delta import KimiDelta
from nanovllm.kernels.state_types import LayerState, StepStates
from nanovllm.kernels.triton.causal_conv import advance, causal_conv_triton, convolved
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import next_power_of_2
from nanovllm.kernels.triton.common.state_steps import behind_decodes
from nanovllm.kernels.triton.kimi_chunks import gated_norm_triton, kimi_chunks_triton
from nanovllm.kernels.triton.state_parts import softplus

CELLS = 4096  # of a matrix that are in registers at a time: what four warps have room for


@triton.jit
def _kimi_delta_kernel(
    qkv_ptr,
    f_ptr,
    b_ptr,
    z_ptr,
    conv_weight_ptr,
    decay_ptr,
    dt_bias_ptr,
    norm_ptr,
    conv_ptr,
    matrices_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    snapshots_ptr,
    out_ptr,
    qkv_stride,
    f_stride,
    b_stride,
    z_stride,
    conv_stride,
    matrix_stride,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    L2_EPS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    VALUES: tl.constexpr = HEADS * DIM
    CHANNELS: tl.constexpr = 3 * VALUES
    request, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + request).to(tl.int64)
    start = tl.load(starts_ptr + request)
    end = tl.load(starts_ptr + request + 1)
    number = tl.arange(0, BLOCK_DIM)
    mask, at = number < DIM, head * DIM + number  # of a head among all
    dtype = out_ptr.dtype.element_ty
    if row < 0:  # padding: what its tokens are must be numbers
        for index in range(start, end):
            token = tl.zeros((), tl.int64) + index
            tl.store(out_ptr + token * VALUES + at, tl.zeros((BLOCK_DIM,), dtype), mask=mask)
        return
    had_tokens = tl.load(seq_lens_ptr + request) > end - start
    conv = conv_ptr + row * conv_stride
    decay, dt_bias = tl.load(decay_ptr + head), tl.load(dt_bias_ptr + at, mask=mask, other=0.0)
    norm = tl.load(norm_ptr + number, mask=mask, other=0.0).to(tl.float32)
    for index in range(start, end):
        token = tl.zeros((), tl.int64) + index
        x = qkv_ptr + token * qkv_stride
        snapshot = tl.load(snapshots_ptr + token).to(tl.int64)
        q = convolved(x, conv_weight_ptr, None, conv, had_tokens, at, mask, CHANNELS, WIDTH, False)
        k = convolved(x, conv_weight_ptr, None, conv, had_tokens, VALUES + at, mask, CHANNELS, WIDTH, False)
        advance(x, conv_ptr, conv_stride, row, snapshot, had_tokens, at, mask, CHANNELS, WIDTH)
        advance(x, conv_ptr, conv_stride, row, snapshot, had_tokens, VALUES + at, mask, CHANNELS, WIDTH)
        q *= tl.rsqrt(tl.sum(q * q, 0) + L2_EPS) * (DIM**-0.5)
        k *= tl.rsqrt(tl.sum(k * k, 0) + L2_EPS)
        f = tl.load(f_ptr + token * f_stride + at, mask=mask, other=0.0).to(tl.float32) + dt_bias
        alpha = tl.exp(-decay * softplus(f))
        beta = 1.0 / (1.0 + tl.exp(-tl.load(b_ptr + token * b_stride + head).to(tl.float32)))
        squares = 0.0
        for first in range(0, DIM, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            is_column = column < DIM
            v_channel = 2 * VALUES + head * DIM + column
            v = convolved(x, conv_weight_ptr, None, conv, had_tokens, v_channel, is_column, CHANNELS, WIDTH, False)
            advance(x, conv_ptr, conv_stride, row, snapshot, had_tokens, v_channel, is_column, CHANNELS, WIDTH)
            is_cell = mask[:, None] & is_column[None, :]
            cell = (head * DIM + number[:, None]) * DIM + column[None, :]
            matrix_ptr = matrices_ptr + row * matrix_stride + cell
            matrix = alpha[:, None] * tl.load(matrix_ptr, mask=is_cell & had_tokens, other=0.0)
            change = beta * (v - tl.sum(k[:, None] * matrix, 0))
            matrix += k[:, None] * change[None, :]
            tl.store(matrix_ptr, matrix, mask=is_cell)
            if snapshot >= 0:
                tl.store(matrices_ptr + snapshot * matrix_stride + cell, matrix, mask=is_cell)
            found = tl.sum(q[:, None] * matrix, 0).to(dtype)
            squares += tl.sum(found.to(tl.float32) * found.to(tl.float32), 0)
            tl.store(out_ptr + token * VALUES + head * DIM + column, found, mask=is_column)
        tl.debug_barrier()
        found = tl.load(out_ptr + token * VALUES + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + token * z_stride + at, mask=mask, other=0.0).to(tl.float32)
        y = found * tl.rsqrt(squares / DIM + eps) * norm / (1.0 + tl.exp(-z))
        tl.debug_barrier()
        tl.store(out_ptr + token * VALUES + at, y.to(dtype), mask=mask)
        had_tokens = had_tokens | (token >= start)
        tl.debug_barrier()  # what this token wrote, other threads may read for the next one


def kimi_delta_triton(
    qkv: Tensor, f: Tensor, b: Tensor, z: Tensor, net: KimiDelta, state: LayerState, step: StepStates, is_exact: bool
) -> Tensor:
    """See `kimi_delta.kimi_delta`."""
    meta = step.meta
    out = torch.empty((qkv.shape[0], net.num_heads * net.head_dim), dtype=qkv.dtype, device=qkv.device)
    num_singles = meta.num_reqs if is_exact else meta.num_decodes
    if num_singles:
        _steps(qkv, f, b, z, net, state, step, num_singles, out)
    if num_singles < meta.num_reqs:
        rest = behind_decodes(step, num_singles)
        out[num_singles:].zero_()  # padding has tokens, too, and what they are must be numbers
        mixed = causal_conv_triton(qkv, net.conv_weight, None, state.conv, rest, is_gated=False)
        kimi_chunks_triton(mixed, f, b, net, state.matrices, rest, out)
        gated_norm_triton(out[num_singles:], z[num_singles:], net)
    return out


def _steps(
    qkv: Tensor, f: Tensor, b: Tensor, z: Tensor, net: KimiDelta, state: LayerState, step: StepStates, num_reqs: int,
    out: Tensor,
) -> None:  # fmt: skip
    block_dim = next_power_of_2(net.head_dim)
    columns = min(block_dim, CELLS // block_dim)
    launch(
        _kimi_delta_kernel, (num_reqs, net.num_heads), qkv.device,
        qkv, f, b, z, net.conv_weight, net.decay, net.dt_bias, net.norm_weight, state.conv, state.matrices,
        step.rows, step.meta.query_start_loc, step.meta.seq_lens, step.snapshots, out,
        qkv.stride(0), f.stride(0), b.stride(0), z.stride(0), state.conv.stride(0), state.matrices.stride(0), net.eps,
        HEADS=net.num_heads, DIM=net.head_dim, WIDTH=net.conv_weight.shape[0], L2_EPS=L2_EPS,
        BLOCK_DIM=block_dim, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
