"""Kimi delta attention over prompts in Triton, CHUNK tokens at a time (Kimi Team, 2025).

Owns the kernel that takes some columns of a matrix S through a request's chunks, one after the other. Within a chunk,
what its tokens change depends on each other through the products of their keys: a triangular system, as in
`delta_chunks.py`, but each number of a key fades by itself between two tokens. How much is e to a difference of sums of
logarithms, and taken as it is: as a product of two numbers, one of them might be infinite. So chunks are short, and
what is solved for them is solved anew for each part of the columns. Invariant: a chunk ends at a multiple of CHUNK in
its context, or where the step's part of it ends, so at such places S can be kept.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.delta_net import L2_EPS
from nanovllm.kernels.kimi_delta import KimiDelta
from nanovllm.kernels.state_types import StepStates
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.delta_chunks import PRECISION, inverse, unit_rows
from nanovllm.kernels.triton.state_parts import keep_matrix, softplus

CHUNK = 16
NUM_COLUMNS = 32  # of S, that one program takes through a prompt


@triton.jit
def _kimi_chunks_kernel(
    qkv_ptr,
    f_ptr,
    b_ptr,
    decay_ptr,
    dt_bias_ptr,
    matrices_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    snapshots_ptr,
    found_ptr,
    qkv_stride,
    f_stride,
    b_stride,
    matrix_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    L2_EPS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    VALUES: tl.constexpr = HEADS * DIM
    request, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + request).to(tl.int64)
    start = tl.load(starts_ptr + request)
    end = tl.load(starts_ptr + request + 1)
    seq_len = tl.load(seq_lens_ptr + request)
    number, nth = tl.arange(0, BLOCK_DIM), tl.arange(0, CHUNK)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_number, is_column = number < DIM, column < DIM
    is_cell = is_number[None, :] & is_column[:, None]
    cell = (head * DIM + number[None, :]) * DIM + column[:, None]
    num_before = tl.maximum(seq_len - (end - start), 0)  # of padding, none
    had_tokens = (row >= 0) & (num_before > 0)
    s = tl.load(matrices_ptr + row * matrix_stride + cell, mask=is_cell & had_tokens, other=0.0)
    decay = tl.load(decay_ptr + head)
    dt_bias = tl.load(dt_bias_ptr + head * DIM + number, mask=is_number, other=0.0)
    begin = start
    while begin < end:
        size = tl.minimum(CHUNK - (num_before + begin - start) % CHUNK, end - begin)
        is_token = nth < size
        token = (begin + nth).to(tl.int64)
        q = unit_rows(qkv_ptr, token, head * DIM, is_token, qkv_stride, DIM, BLOCK_DIM, L2_EPS) * (DIM**-0.5)
        k = unit_rows(qkv_ptr, token, VALUES + head * DIM, is_token, qkv_stride, DIM, BLOCK_DIM, L2_EPS)
        v_ptr = qkv_ptr + token[:, None] * qkv_stride + 2 * VALUES + head * DIM + column[None, :]
        v = tl.load(v_ptr, mask=is_token[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        beta = 1.0 / (1.0 + tl.exp(-tl.load(b_ptr + token * b_stride + head, mask=is_token, other=0.0).to(tl.float32)))
        is_gate = is_token[:, None] & is_number[None, :]
        f = tl.load(f_ptr + token[:, None] * f_stride + head * DIM + number[None, :], mask=is_gate, other=0.0)
        f = f.to(tl.float32) + dt_bias[None, :]
        faded = tl.cumsum(tl.where(is_gate, -decay * softplus(f), 0.0), 0)  # logarithms, from the chunk's begin on

        of_keys = tl.zeros([CHUNK, CHUNK], tl.float32)
        of_queries = tl.zeros([CHUNK, CHUNK], tl.float32)
        for j in range(CHUNK):
            is_j = nth == j
            k_j = tl.sum(tl.where(is_j[:, None], k, 0.0), 0)
            faded_j = tl.sum(tl.where(is_j[:, None], faded, 0.0), 0)
            left = k_j[None, :] * tl.exp(tl.minimum(faded - faded_j[None, :], 0.0))  # of key j when token i comes
            of_keys += tl.where(is_j[None, :], tl.sum(k * left, 1)[:, None], 0.0)
            of_queries += tl.where(is_j[None, :], tl.sum(q * left, 1)[:, None], 0.0)
        lower = tl.where(nth[:, None] > nth[None, :], of_keys * beta[:, None], 0.0)
        of_queries = tl.where(nth[:, None] >= nth[None, :], of_queries, 0.0)

        share = tl.exp(faded)
        known = tl.dot(k * share, tl.trans(s), input_precision=PRECISION)
        wanted = tl.where(is_token[:, None], beta[:, None] * (v - known), 0.0)
        change = tl.dot(inverse(lower, CHUNK), wanted, input_precision=PRECISION)
        found = tl.dot(q * share, tl.trans(s), input_precision=PRECISION)
        found += tl.dot(of_queries, change, input_precision=PRECISION)
        place = token[:, None] * VALUES + head * DIM + column[None, :]
        here = is_token[:, None] & is_column[None, :]
        tl.store(found_ptr + place, tl.where(row >= 0, found, 0.0).to(found_ptr.dtype.element_ty), mask=here)

        last = tl.sum(tl.where((nth == size - 1)[:, None], faded, 0.0), 0)
        k_left = tl.where(is_token[:, None], k * tl.exp(tl.minimum(last[None, :] - faded, 0.0)), 0.0)
        s = tl.exp(last)[None, :] * s + tl.dot(tl.trans(change), k_left, input_precision=PRECISION)
        begin += size
        keep_matrix(s, matrices_ptr, matrix_stride, cell, is_cell, snapshots_ptr + begin - 1)
    if (row >= 0) & (end > start):
        tl.store(matrices_ptr + row * matrix_stride + cell, s, mask=is_cell)


def kimi_chunks_triton(
    qkv: Tensor, f: Tensor, b: Tensor, net: KimiDelta, matrices: Tensor, step: StepStates, found: Tensor
) -> None:
    """Writes q S of the step's tokens into found [num_tokens, values]; qkv is convolved already."""
    block_dim = next_power_of_2(net.head_dim)
    columns = min(block_dim, NUM_COLUMNS)
    launch(
        _kimi_chunks_kernel, (len(step.rows), net.num_heads, cdiv(net.head_dim, columns)), qkv.device,
        qkv, f, b, net.decay, net.dt_bias, matrices, step.rows, step.meta.query_start_loc, step.meta.seq_lens,
        step.snapshots, found, qkv.stride(0), f.stride(0), b.stride(0), matrices.stride(0),
        HEADS=net.num_heads, DIM=net.head_dim, L2_EPS=L2_EPS, BLOCK_DIM=block_dim, COLUMNS=columns, CHUNK=CHUNK,
        num_warps=8,
    )  # fmt: skip
