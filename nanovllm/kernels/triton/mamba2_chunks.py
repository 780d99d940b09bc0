"""Mamba-2 over prompts in Triton, CHUNK tokens at a time (Dao and Gu, 2024), or one after the other.

Within a chunk, its tokens see each other as in attention without a softmax, faded by the steps between them; what was
before they see through the state. Owns the three kernels: states through a request's chunks, one after the other; the
same token by token; the norm. Invariant: a chunk ends at a multiple of CHUNK in its context, or where the step's part
of it ends, so at the end of a block of CHUNK tokens a state can be kept.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.delta_net import CHUNK
from nanovllm.kernels.mamba2 import Mamba2
from nanovllm.kernels.state_types import StepStates
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.delta_chunks import COLUMNS, PRECISION
from nanovllm.kernels.triton.state_parts import keep_matrix, part_of_step, softplus


@triton.jit
def _pass_chunks_kernel(
    xbc_ptr,
    zxbcdt_ptr,
    decay_ptr,
    dt_bias_ptr,
    skip_ptr,
    matrices_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    snapshots_ptr,
    gated_ptr,
    stride,
    slot_stride,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    STATE: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some columns of a head's state, as rows, through a request's tokens: in chunks, or with STEPS one by one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    VALUES: tl.constexpr = HEADS * DIM
    CHANNELS: tl.constexpr = VALUES + 2 * GROUPS * STATE
    request, head = tl.program_id(0), tl.program_id(1)
    slot, start, length = part_of_step(request, rows_ptr, starts_ptr)
    if (slot < 0) | (length == 0):
        return
    before = tl.load(seq_lens_ptr + request) - length
    number, dim = tl.arange(0, BLOCK_STATE), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_number, is_dim = number < STATE, dim < DIM
    cell = (head * STATE + number[None, :]) * DIM + dim[:, None]
    is_cell = is_number[None, :] & is_dim[:, None]
    matrix = tl.load(matrices_ptr + slot * slot_stride + cell, mask=is_cell & (before > 0), other=0.0)
    b_at = VALUES + head // (HEADS // GROUPS) * STATE
    c_at = b_at + GROUPS * STATE
    decay, dt_bias, skip = tl.load(decay_ptr + head), tl.load(dt_bias_ptr + head), tl.load(skip_ptr + head)
    dtype = xbc_ptr.dtype.element_ty
    SPAN: tl.constexpr = 1 if STEPS else CHUNK
    index = tl.arange(0, SPAN)
    for first in range(0 if STEPS else -(before % CHUNK), length, SPAN):
        offset = first + index
        is_row = (offset >= 0) & (offset < length)
        token = (start + offset).to(tl.int64)
        numbers = token[:, None] * CHANNELS + number[None, :]
        is_vector = is_row[:, None] & is_number[None, :]
        b = tl.load(xbc_ptr + numbers + b_at, mask=is_vector, other=0.0)
        c = tl.load(xbc_ptr + numbers + c_at, mask=is_vector, other=0.0)
        mask = is_row[:, None] & is_dim[None, :]
        x = tl.load(xbc_ptr + token[:, None] * CHANNELS + (head * DIM + dim)[None, :], mask=mask, other=0.0)
        dt = tl.load(zxbcdt_ptr + token * stride + VALUES + CHANNELS + head, mask=is_row, other=0.0).to(tl.float32)
        dt = tl.where(is_row, softplus(dt + dt_bias), 0.0)
        if STEPS:
            new = tl.sum((dt[:, None] * b.to(tl.float32))[:, None, :] * x.to(tl.float32)[:, :, None], 0)
            matrix = matrix * tl.exp(-decay * tl.sum(dt, 0)) + new
            found = tl.sum(c.to(tl.float32) * matrix, 1)[None, :]
        else:
            faded = tl.cumsum(-decay * dt, 0)
            row, col = index[:, None], index[None, :]
            scores = tl.dot(c, tl.trans(b), input_precision=PRECISION)
            scores *= tl.exp(tl.where(row >= col, faded[:, None] - faded[None, :], 0.0)) * dt[None, :]
            scores = tl.where(row >= col, scores, 0.0).to(dtype)
            found = tl.dot(scores, x, input_precision=PRECISION)
            found += tl.dot(c, tl.trans(matrix.to(dtype)), input_precision=PRECISION) * tl.exp(faded)[:, None]
            whole = tl.sum(-decay * dt, 0)
            new = (x.to(tl.float32) * (dt * tl.exp(whole - faded))[:, None]).to(dtype)
            matrix = matrix * tl.exp(whole) + tl.dot(tl.trans(new), b, input_precision=PRECISION)
        z_at = token[:, None] * stride + (head * DIM + dim)[None, :]
        z = tl.load(zxbcdt_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
        found = (found + skip * x.to(tl.float32)) * (z / (1.0 + tl.exp(-z)))
        tl.store(gated_ptr + token[:, None] * VALUES + (head * DIM + dim)[None, :], found.to(dtype), mask=mask)
        last = tl.minimum(first + SPAN, length) - 1
        keep_matrix(matrix, matrices_ptr, slot_stride, cell, is_cell, snapshots_ptr + start + last)
    tl.store(matrices_ptr + slot * slot_stride + cell, matrix, mask=is_cell)


@triton.jit
def _norm_kernel(
    gated_ptr,
    norm_ptr,
    eps,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A group of heads of a token, in place."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    number = tl.arange(0, BLOCK)
    mask = number < SIZE
    at = gated_ptr + tl.program_id(0).to(tl.int64) * (GROUPS * SIZE) + tl.program_id(1) * SIZE + number
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    dtype = gated_ptr.dtype.element_ty
    y = (y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps)).to(dtype).to(tl.float32)
    weight = tl.load(norm_ptr + tl.program_id(1) * SIZE + number, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (y * weight).to(dtype), mask=mask)


def mamba2_chunks_triton(
    xbc: Tensor,
    zxbcdt: Tensor,
    net: Mamba2,
    matrices: Tensor,
    step: StepStates,
    out: Tensor,
    first: int,
    is_exact: bool,
) -> None:
    """Fill `out` from token `first` on, with which the step's requests begin. xbc: after the convolution."""
    out[first:].zero_()  # padding has tokens, too, and what they are must be numbers
    columns = max(16, min(COLUMNS, next_power_of_2(net.head_dim)))
    block_state = max(16, next_power_of_2(net.state_dim))
    launch(
        _pass_chunks_kernel, (step.meta.num_reqs, net.num_heads, cdiv(net.head_dim, columns)), xbc.device,
        xbc, zxbcdt, net.decay, net.dt_bias, net.skip, matrices,
        step.rows, step.meta.query_start_loc, step.meta.seq_lens, step.snapshots, out,
        zxbcdt.stride(0), matrices.stride(0),
        GROUPS=net.num_groups, HEADS=net.num_heads, STATE=net.state_dim, DIM=net.head_dim, CHUNK=CHUNK,
        STEPS=is_exact, BLOCK_STATE=block_state, COLUMNS=columns, num_warps=4, num_stages=1,
    )  # fmt: skip
    if net.norm_weight is not None:
        size = net.num_values // net.num_groups
        launch(
            _norm_kernel, (len(out) - first, net.num_groups), out.device, out[first:], net.norm_weight, net.eps,
            SIZE=size, GROUPS=net.num_groups, BLOCK=next_power_of_2(size), num_warps=8 if size > 2048 else 4,
        )  # fmt: skip
