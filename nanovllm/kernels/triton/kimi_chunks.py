"""Kimi delta attention over prompts in Triton, CHUNK tokens at a time (Kimi Team, 2025).

Within a chunk, what its tokens change depends on each other through the products of their keys: a triangular system, as
in `delta_chunks.py`, but each number of a key fades by itself between two tokens. How much is e to a difference of sums
of logarithms, and taken as it is: as a product of two numbers, one of them might be infinite. So chunks are short. What
does not depend on the matrix S is computed for all chunks side by side; then S goes through a request's chunks, one
after the other. Owns these two kernels, and the norm behind them. Invariant: a chunk ends at a multiple of CHUNK in its
context, or where the step's part of it ends, so at such places S can be kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.delta_net import L2_EPS
from nanovllm.kernels.kimi_delta import KimiDelta
from nanovllm.kernels.state_types import StepStates
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.delta_chunks import PRECISION, chunk_of, first_place, inverse
from nanovllm.kernels.triton.state_parts import keep_matrix, part_of_step, softplus

CHUNK = 16
SLICE = 16  # numbers of a head whose fading between all pairs of tokens is in registers at a time
NUM_COLUMNS = 32  # of S, that one program takes through a prompt


@triton.jit
def _numbers(ptr, token, at, is_row, dim, stride, DIM: tl.constexpr):
    """Of each token the numbers `dim` of those that begin at `at`, float32."""
    mask = is_row[:, None] & (dim < DIM)[None, :]
    return tl.load(ptr + token[:, None] * stride + at + dim[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _fading(f_ptr, dt_bias_ptr, decay, token, at, is_row, dim, f_stride, DIM: tl.constexpr):
    """The logarithm of how much of these numbers of a key is left of each, float32 [tokens, dim]."""
    f = _numbers(f_ptr, token, at, is_row, dim, f_stride, DIM)
    f += tl.load(dt_bias_ptr + at + dim, mask=dim < DIM, other=0.0)[None, :]
    return tl.where(is_row[:, None] & (dim < DIM)[None, :], -decay * softplus(f), 0.0)


@triton.jit(do_not_specialize=["max_chunks"])
def _solve_kimi_chunks_kernel(
    qkv_ptr,
    f_ptr,
    b_ptr,
    decay_ptr,
    dt_bias_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    queries_ptr,
    keys_ptr,
    takes_ptr,
    changes_ptr,
    scores_ptr,
    faded_ptr,
    max_chunks,
    qkv_stride,
    f_stride,
    b_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    L2_EPS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    SLICE: tl.constexpr,
    PDL: tl.constexpr,
):
    """queries: as they ask S before the chunk. keys: faded to its end. takes, changes: what the tokens change is
    changes - takes S. scores: of a query and the keys of its chunk. faded: by place and head, the logarithms of what
    stays of S.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    start, length, first, place, is_there = chunk_of(
        tl.program_id(0), max_chunks, rows_ptr, starts_ptr, seq_lens_ptr, CHUNK
    )
    if not is_there:
        return
    head = tl.program_id(1)
    VALUES: tl.constexpr = HEADS * DIM
    offset = first + tl.arange(0, CHUNK)
    is_row = (offset >= 0) & (offset < length)
    token = (start + offset).to(tl.int64)
    at, dim = head * DIM, tl.arange(0, BLOCK_DIM)
    decay = tl.load(decay_ptr + head)
    q = _numbers(qkv_ptr, token, at, is_row, dim, qkv_stride, DIM)
    k = _numbers(qkv_ptr, token, VALUES + at, is_row, dim, qkv_stride, DIM)
    q_scale = tl.rsqrt(tl.sum(q * q, 1) + L2_EPS) * (DIM**-0.5)
    k_scale = tl.rsqrt(tl.sum(k * k, 1) + L2_EPS)

    of_keys = tl.zeros([CHUNK, CHUNK], tl.float32)
    of_queries = tl.zeros([CHUNK, CHUNK], tl.float32)
    for begin in range(0, DIM, SLICE):
        some = begin + tl.arange(0, SLICE)
        faded = tl.cumsum(_fading(f_ptr, dt_bias_ptr, decay, token, at, is_row, some, f_stride, DIM), 0)
        keys = _numbers(qkv_ptr, token, VALUES + at, is_row, some, qkv_stride, DIM) * k_scale[:, None]
        queries = _numbers(qkv_ptr, token, at, is_row, some, qkv_stride, DIM) * q_scale[:, None]
        # Of key j, when token i comes; what comes before it is left out below.
        left = keys[None, :, :] * tl.exp(tl.minimum(faded[:, None, :] - faded[None, :, :], 0.0))
        of_keys += tl.sum(keys[:, None, :] * left, 2)
        of_queries += tl.sum(queries[:, None, :] * left, 2)
    row, col = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    beta = 1.0 / (1.0 + tl.exp(-tl.load(b_ptr + token * b_stride + head, mask=is_row, other=0.0).to(tl.float32)))
    beta = tl.where(is_row, beta, 0.0)[:, None]
    dtype = qkv_ptr.dtype.element_ty
    solved = inverse(tl.where(row > col, of_keys * beta, 0.0), CHUNK).to(dtype)

    log_left = _fading(f_ptr, dt_bias_ptr, decay, token, at, is_row, dim, f_stride, DIM)
    faded, whole = tl.cumsum(log_left, 0), tl.sum(log_left, 0)
    tl.store(faded_ptr + (place * HEADS + head) * DIM + dim, whole, mask=dim < DIM)
    q, k, share = q * q_scale[:, None], k * k_scale[:, None], tl.exp(faded)
    here = (token * HEADS + head)[:, None]
    place_of_numbers, is_number = here * DIM + dim[None, :], is_row[:, None] & (dim < DIM)[None, :]
    tl.store(queries_ptr + place_of_numbers, (q * share).to(dtype), mask=is_number)
    tl.store(keys_ptr + place_of_numbers, (k * tl.exp(tl.minimum(whole - faded, 0.0))).to(dtype), mask=is_number)
    takes = tl.dot(solved, (k * share * beta).to(dtype), input_precision=PRECISION)
    tl.store(takes_ptr + place_of_numbers, takes.to(dtype), mask=is_number)
    v = _numbers(qkv_ptr, token, 2 * VALUES + at, is_row, dim, qkv_stride, DIM)
    changes = tl.dot(solved, (v * beta).to(dtype), input_precision=PRECISION)
    tl.store(changes_ptr + place_of_numbers, changes.to(dtype), mask=is_number)
    of_queries = tl.where(row >= col, of_queries, 0.0)
    tl.store(scores_ptr + here * CHUNK + col, of_queries.to(dtype), mask=is_row[:, None])


@triton.jit
def _pass_kimi_chunks_kernel(
    queries_ptr,
    keys_ptr,
    takes_ptr,
    changes_ptr,
    scores_ptr,
    faded_ptr,
    matrices_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    snapshots_ptr,
    found_ptr,
    matrix_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some columns of S, as rows, through a request's chunks, each of which asks it and then changes it."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    request, head = tl.program_id(0), tl.program_id(1)
    slot, start, length = part_of_step(request, rows_ptr, starts_ptr)
    if (slot < 0) | (length == 0):
        return
    before = tl.load(seq_lens_ptr + request) - length
    number, column = tl.arange(0, BLOCK_DIM), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_number, is_column = number < DIM, column < DIM
    is_cell = is_number[None, :] & is_column[:, None]
    cell = (head * DIM + number[None, :]) * DIM + column[:, None]
    matrix = tl.load(matrices_ptr + slot * matrix_stride + cell, mask=is_cell & (before > 0), other=0.0)
    dtype = keys_ptr.dtype.element_ty
    nth = tl.arange(0, CHUNK)
    place = first_place(request, start, CHUNK)
    for first in range(-(before % CHUNK), length, CHUNK):
        offset = first + nth
        is_row = (offset >= 0) & (offset < length)
        here = ((start + offset).to(tl.int64) * HEADS + head)[:, None]
        numbers, mask = here * DIM + number[None, :], is_row[:, None] & is_number[None, :]
        takes = tl.load(takes_ptr + numbers, mask=mask, other=0.0)
        queries = tl.load(queries_ptr + numbers, mask=mask, other=0.0)
        keys = tl.load(keys_ptr + numbers, mask=mask, other=0.0)
        scores = tl.load(scores_ptr + here * CHUNK + nth[None, :], mask=is_row[:, None], other=0.0)
        some, is_some = here * DIM + column[None, :], is_row[:, None] & is_column[None, :]
        change = tl.load(changes_ptr + some, mask=is_some, other=0.0).to(tl.float32)
        whole = tl.load(faded_ptr + (place * HEADS + head) * DIM + number, mask=is_number, other=0.0)
        rounded = tl.trans(matrix.to(dtype))
        change = (change - tl.dot(takes, rounded, input_precision=PRECISION)).to(dtype)
        found = tl.dot(queries, rounded, input_precision=PRECISION)
        found += tl.dot(scores, change, input_precision=PRECISION)
        tl.store(found_ptr + some, found.to(found_ptr.dtype.element_ty), mask=is_some)
        matrix = matrix * tl.exp(whole)[None, :] + tl.dot(tl.trans(change), keys, input_precision=PRECISION)
        last = tl.minimum(first + CHUNK, length) - 1
        keep_matrix(matrix, matrices_ptr, matrix_stride, cell, is_cell, snapshots_ptr + start + last)
        place += 1
    tl.store(matrices_ptr + slot * matrix_stride + cell, matrix, mask=is_cell)


@triton.jit
def _gated_norm_kernel(
    found_ptr,
    z_ptr,
    weight_ptr,
    z_stride,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token, in place."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head, dim = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    at, mask = head * DIM + dim, (head < HEADS) & (dim < DIM)
    found_ptr += token * HEADS * DIM + at
    found = tl.load(found_ptr, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + token * z_stride + at, mask=mask, other=0.0).to(tl.float32)
    normed = found * tl.rsqrt(tl.sum(found * found, 1) / DIM + eps)[:, None] * weight
    tl.store(found_ptr, (normed / (1.0 + tl.exp(-z))).to(found_ptr.dtype.element_ty), mask=mask)


def gated_norm_triton(found: Tensor, z: Tensor, net: KimiDelta) -> None:
    """`kimi_delta.gated_norm` in place; rows of found are contiguous."""
    launch(
        _gated_norm_kernel, (len(found),), found.device,
        found, z, net.norm_weight, z.stride(0), net.eps, HEADS=net.num_heads, DIM=net.head_dim,
        BLOCK_HEADS=next_power_of_2(net.num_heads), BLOCK_DIM=next_power_of_2(net.head_dim), num_warps=4,
    )  # fmt: skip


def kimi_chunks_triton(
    qkv: Tensor, f: Tensor, b: Tensor, net: KimiDelta, matrices: Tensor, step: StepStates, found: Tensor
) -> None:
    """Writes q S of the step's tokens into found [num_tokens, values], whose rows of other tokens stay as they are; qkv
    is convolved already."""
    meta, device, (num_tokens, _), heads, dim = step.meta, qkv.device, qkv.shape, net.num_heads, net.head_dim
    queries, keys, takes, changes = (qkv.new_empty(num_tokens, heads, dim) for _ in range(4))
    scores = qkv.new_empty(num_tokens, heads, CHUNK)
    faded = qkv.new_empty(num_tokens // CHUNK + 2 * meta.num_reqs, heads, dim, dtype=torch.float32)
    block_dim = max(16, next_power_of_2(dim))
    columns, max_chunks = min(block_dim, NUM_COLUMNS), cdiv(meta.max_query_len - 1, CHUNK) + 1
    lens = step.rows, meta.query_start_loc, meta.seq_lens
    made = queries, keys, takes, changes, scores, faded
    shape = {"HEADS": heads, "DIM": dim, "CHUNK": CHUNK, "BLOCK_DIM": block_dim}
    launch(
        _solve_kimi_chunks_kernel, (meta.num_reqs * max_chunks, heads), device,
        qkv, f, b, net.decay, net.dt_bias, *lens, *made, max_chunks, qkv.stride(0), f.stride(0), b.stride(0),
        **shape, L2_EPS=L2_EPS, SLICE=SLICE, num_warps=4,
    )  # fmt: skip
    launch(
        _pass_kimi_chunks_kernel, (meta.num_reqs, heads, cdiv(dim, columns)), device,
        *made, matrices, *lens, step.snapshots, found, matrices.stride(0), **shape, COLUMNS=columns,
        num_warps=4, num_stages=2,
    )  # fmt: skip
