"""The gated delta net over prompts in Triton, CHUNK tokens at a time (Yang et al., 2024 and 2025), or one by one.

Within a chunk, what its tokens change depends on each other through the products of their keys: a triangular system,
the same whatever the matrix S is before it. So what they would change without S, and how S takes from it, is solved for
all chunks side by side; then S goes through a request's chunks, one after the other; then all chunks ask it and norm.
Owns these three kernels, and one that goes token by token. Invariant: a chunk ends at a multiple of CHUNK in its
context, or where the step's part of it ends, so at the end of a block of CHUNK tokens S can be kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.delta_net import CHUNK, L2_EPS, DeltaNet
from nanovllm.kernels.state_types import StepStates
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.state_parts import keep_matrix, part_of_step, softplus

COLUMNS = 32  # of S, that one program takes through a prompt, as rows: no more than CHUNK, for the same reason
# Of float32: three products on the matrix units, which leave as much as one without them, and take a tenth of its time.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def unit_rows(ptr, token, at, is_row, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, L2_EPS: tl.constexpr):
    """Rows of `token`, from number `at` on, at unit length, float32 [tokens, BLOCK]."""
    dim = tl.arange(0, BLOCK)
    mask = is_row[:, None] & (dim < DIM)[None, :]
    x = tl.load(ptr + token[:, None] * stride + at + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 1) + L2_EPS)[:, None]


@triton.jit
def gates(ba_ptr, decay_ptr, dt_bias_ptr, token, is_row, head, ba_stride, HEADS: tl.constexpr):
    """beta and the logarithm of alpha of each token; what is no row changes nothing."""
    at = ba_ptr + token * ba_stride + head
    b = tl.load(at, mask=is_row, other=0.0).to(tl.float32)
    a = softplus(tl.load(at + HEADS, mask=is_row, other=0.0).to(tl.float32) + tl.load(dt_bias_ptr + head))
    log_alpha = tl.where(is_row, -tl.load(decay_ptr + head) * a, 0.0)
    return tl.where(is_row, 1.0 / (1.0 + tl.exp(-b)), 0.0), log_alpha


@triton.jit
def inverse(lower, CHUNK: tl.constexpr):
    """Of 1 + lower, where lower is strictly so: blocks of two rows, then pairs of blocks, as (D + O)^-1 is
    D^-1 - D^-1 O D^-1 where O is what the second of each pair has below the first."""
    row, col = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    found = tl.where(row == col, 1.0, 0.0) - tl.where(row // 2 == col // 2, lower, 0.0)
    size = 2
    while size < CHUNK:
        below = (row // (2 * size) == col // (2 * size)) & (row // size != col // size)
        other = tl.dot(found, tl.where(below, lower, 0.0), input_precision=PRECISION)
        found -= tl.dot(other, found, input_precision=PRECISION)
        size *= 2
    return found


@triton.jit
def gated_norm(found, z, weight, eps, VALUES: tl.constexpr, DTYPE: tl.constexpr):
    """found, z [tokens, values]; rounded as the reference rounds."""
    x = found.to(DTYPE).to(tl.float32)
    x = (x * tl.rsqrt(tl.sum(x * x, 1) / VALUES + eps)[:, None]).to(DTYPE).to(tl.float32)
    x = (x * weight[None, :]).to(DTYPE).to(tl.float32)
    return (x * (z / (1.0 + tl.exp(-z)))).to(DTYPE)


@triton.jit
def chunk_of(program, max_chunks, rows_ptr, starts_ptr, seq_lens_ptr, CHUNK: tl.constexpr):
    """Of a program: its request's first token in the step, and how many it has there; the chunk's first one among
    them, which may lie before; the chunk's place among those of the step; is there such a chunk?"""
    request, chunk = program // max_chunks, program % max_chunks
    start = tl.load(starts_ptr + request)
    length = tl.load(starts_ptr + request + 1) - start
    first = chunk * CHUNK - (tl.load(seq_lens_ptr + request) - length) % CHUNK
    place = first_place(request, start, CHUNK) + chunk
    return start, length, first, place, (tl.load(rows_ptr + request) >= 0) & (first < length)


@triton.jit
def first_place(request, start, CHUNK: tl.constexpr):
    """A request of n tokens has at most n // CHUNK + 2 chunks."""
    return (start // CHUNK + 2 * request).to(tl.int64)


@triton.jit(do_not_specialize=["max_chunks"])
def _solve_chunks_kernel(
    qkv_ptr,
    ba_ptr,
    decay_ptr,
    dt_bias_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    keys_ptr,
    takes_ptr,
    changes_ptr,
    faded_ptr,
    max_chunks,
    qkv_stride,
    ba_stride,
    KEY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    L2_EPS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PDL: tl.constexpr,
):
    """keys: faded to the chunk's end. takes, changes: what the tokens change is changes - takes S. faded: by place and
    head, the logarithm of what stays of S."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    start, length, first, place, is_there = chunk_of(
        tl.program_id(0), max_chunks, rows_ptr, starts_ptr, seq_lens_ptr, CHUNK
    )
    if not is_there:
        return
    head = tl.program_id(1)
    offset = first + tl.arange(0, CHUNK)
    is_row = (offset >= 0) & (offset < length)
    token = (start + offset).to(tl.int64)
    beta, log_alpha = gates(ba_ptr, decay_ptr, dt_bias_ptr, token, is_row, head, ba_stride, HEADS)
    faded, whole = tl.cumsum(log_alpha, 0), tl.sum(log_alpha, 0)
    tl.store(faded_ptr + place * HEADS + head, whole)
    key_at = (KEY_HEADS + head // (HEADS // KEY_HEADS)) * KEYS
    k = unit_rows(qkv_ptr, token, key_at, is_row, qkv_stride, KEYS, BLOCK_KEYS, L2_EPS)
    dtype = qkv_ptr.dtype.element_ty
    row, col = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    products = tl.dot(k.to(dtype), tl.trans(k.to(dtype)), input_precision=PRECISION)
    products *= tl.where(row > col, tl.exp(tl.where(row > col, faded[:, None] - faded[None, :], 0.0)), 0.0)
    solved = inverse(beta[:, None] * products, CHUNK).to(dtype)
    here = (token * HEADS + head)[:, None]
    key, value = tl.arange(0, BLOCK_KEYS)[None, :], tl.arange(0, BLOCK_VALUES)[None, :]
    is_key, is_value = is_row[:, None] & (key < KEYS), is_row[:, None] & (value < VALUES)
    tl.store(keys_ptr + here * KEYS + key, (k * tl.exp(whole - faded)[:, None]).to(dtype), mask=is_key)
    takes = tl.dot(solved, (k * (beta * tl.exp(faded))[:, None]).to(dtype), input_precision=PRECISION)
    tl.store(takes_ptr + here * KEYS + key, takes.to(dtype), mask=is_key)
    v_at = qkv_ptr + token[:, None] * qkv_stride + 2 * KEY_HEADS * KEYS + head * VALUES + value
    v = tl.load(v_at, mask=is_value, other=0.0).to(tl.float32)
    changes = tl.dot(solved, (v * beta[:, None]).to(dtype), input_precision=PRECISION)
    tl.store(changes_ptr + here * VALUES + value, changes.to(dtype), mask=is_value)


@triton.jit
def _pass_chunks_kernel(
    keys_ptr,
    takes_ptr,
    changes_ptr,
    faded_ptr,
    befores_ptr,
    matrices_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    snapshots_ptr,
    slot_stride,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some columns of S, as rows. befores: of each chunk, S before it. changes become what the tokens do change."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    request, head = tl.program_id(0), tl.program_id(1)
    slot, start, length = part_of_step(request, rows_ptr, starts_ptr)
    if (slot < 0) | (length == 0):
        return
    before = tl.load(seq_lens_ptr + request) - length
    key, value = tl.arange(0, BLOCK_KEYS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_key, is_value = key < KEYS, value < VALUES
    is_cell = is_key[None, :] & is_value[:, None]
    cell = (head * KEYS + key[None, :]) * VALUES + value[:, None]
    matrix = tl.load(matrices_ptr + slot * slot_stride + cell, mask=is_cell & (before > 0), other=0.0)
    dtype = keys_ptr.dtype.element_ty
    place = first_place(request, start, CHUNK)
    for first in range(-(before % CHUNK), length, CHUNK):
        offset = first + tl.arange(0, CHUNK)
        is_row = (offset >= 0) & (offset < length)
        here = ((start + offset).to(tl.int64) * HEADS + head)[:, None]
        mask = is_row[:, None] & is_key[None, :]
        takes = tl.load(takes_ptr + here * KEYS + key[None, :], mask=mask, other=0.0)
        keys = tl.load(keys_ptr + here * KEYS + key[None, :], mask=mask, other=0.0)
        change_at = changes_ptr + here * VALUES + value[None, :]
        is_change = is_row[:, None] & is_value[None, :]
        change = tl.load(change_at, mask=is_change, other=0.0).to(tl.float32)
        whole = tl.load(faded_ptr + place * HEADS + head)
        rounded = matrix.to(dtype)
        tl.store(befores_ptr + place * (HEADS * KEYS * VALUES) + cell, rounded, mask=is_cell)
        change = (change - tl.dot(takes, tl.trans(rounded), input_precision=PRECISION)).to(dtype)
        tl.store(change_at, change, mask=is_change)
        matrix = matrix * tl.exp(whole) + tl.dot(tl.trans(change), keys, input_precision=PRECISION)
        last = tl.minimum(first + CHUNK, length) - 1
        keep_matrix(matrix, matrices_ptr, slot_stride, cell, is_cell, snapshots_ptr + start + last)
        place += 1
    tl.store(matrices_ptr + slot * slot_stride + cell, matrix, mask=is_cell)


@triton.jit(do_not_specialize=["max_chunks"])
def _ask_chunks_kernel(
    qkv_ptr,
    z_ptr,
    ba_ptr,
    decay_ptr,
    dt_bias_ptr,
    norm_ptr,
    changes_ptr,
    befores_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    out_ptr,
    max_chunks,
    qkv_stride,
    z_stride,
    ba_stride,
    eps,
    KEY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    L2_EPS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    start, length, first, place, is_there = chunk_of(
        tl.program_id(0), max_chunks, rows_ptr, starts_ptr, seq_lens_ptr, CHUNK
    )
    if not is_there:
        return
    head = tl.program_id(1)
    offset = first + tl.arange(0, CHUNK)
    is_row = (offset >= 0) & (offset < length)
    token = (start + offset).to(tl.int64)
    _, log_alpha = gates(ba_ptr, decay_ptr, dt_bias_ptr, token, is_row, head, ba_stride, HEADS)
    faded = tl.cumsum(log_alpha, 0)
    query_at = head // (HEADS // KEY_HEADS) * KEYS
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    q = unit_rows(qkv_ptr, token, query_at, is_row, qkv_stride, KEYS, BLOCK_KEYS, L2_EPS) * (KEYS**-0.5)
    k = unit_rows(qkv_ptr, token, KEY_HEADS * KEYS + query_at, is_row, qkv_stride, KEYS, BLOCK_KEYS, L2_EPS)
    row, col = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    scores = tl.dot(q.to(dtype), tl.trans(k.to(dtype)), input_precision=PRECISION)
    scores *= tl.exp(tl.where(row >= col, faded[:, None] - faded[None, :], 0.0))
    scores = tl.where(row >= col, scores, 0.0).to(dtype)
    key, value = tl.arange(0, BLOCK_KEYS), tl.arange(0, BLOCK_VALUES)
    is_value = value < VALUES
    cell = (head * KEYS + key[:, None]) * VALUES + value[None, :]
    before = tl.load(
        befores_ptr + place * (HEADS * KEYS * VALUES) + cell, mask=(key < KEYS)[:, None] & is_value[None, :], other=0.0
    )
    here = (token * HEADS + head)[:, None] * VALUES + value[None, :]
    mask = is_row[:, None] & is_value[None, :]
    change = tl.load(changes_ptr + here, mask=mask, other=0.0)
    found = tl.dot((q * tl.exp(faded)[:, None]).to(dtype), before, input_precision=PRECISION)
    found += tl.dot(scores, change, input_precision=PRECISION)
    z_at = z_ptr + token[:, None] * z_stride + head * VALUES + value[None, :]
    z = tl.load(z_at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + value, mask=is_value, other=0.0).to(tl.float32)
    tl.store(out_ptr + here, gated_norm(found, z, weight, eps, VALUES, dtype), mask=mask)


@triton.jit
def _steps_kernel(
    qkv_ptr,
    z_ptr,
    ba_ptr,
    decay_ptr,
    dt_bias_ptr,
    norm_ptr,
    matrices_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    snapshots_ptr,
    out_ptr,
    qkv_stride,
    z_stride,
    ba_stride,
    slot_stride,
    eps,
    KEY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    L2_EPS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A head's matrix through a request's tokens, one after the other."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    request, head = tl.program_id(0), tl.program_id(1)
    slot, start, length = part_of_step(request, rows_ptr, starts_ptr)
    if (slot < 0) | (length == 0):
        return
    key, value = tl.arange(0, BLOCK_KEYS), tl.arange(0, BLOCK_VALUES)
    is_value = value < VALUES
    cell = (head * KEYS + key[:, None]) * VALUES + value[None, :]
    is_cell = (key < KEYS)[:, None] & is_value[None, :]
    had_tokens = tl.load(seq_lens_ptr + request) > length
    matrix = tl.load(matrices_ptr + slot * slot_stride + cell, mask=is_cell & had_tokens, other=0.0)
    query_at = head // (HEADS // KEY_HEADS) * KEYS
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    weight = tl.load(norm_ptr + value, mask=is_value, other=0.0).to(tl.float32)
    one = tl.arange(0, 1)
    for index in range(length):
        token = (start + index + one).to(tl.int64)
        beta, log_alpha = gates(ba_ptr, decay_ptr, dt_bias_ptr, token, one == 0, head, ba_stride, HEADS)
        q = unit_rows(qkv_ptr, token, query_at, one == 0, qkv_stride, KEYS, BLOCK_KEYS, L2_EPS) * (KEYS**-0.5)
        k = unit_rows(qkv_ptr, token, KEY_HEADS * KEYS + query_at, one == 0, qkv_stride, KEYS, BLOCK_KEYS, L2_EPS)
        q, k = tl.trans(q), tl.trans(k)  # columns
        v_at = qkv_ptr + token[:, None] * qkv_stride + 2 * KEY_HEADS * KEYS + head * VALUES + value[None, :]
        v = tl.load(v_at, mask=is_value[None, :], other=0.0).to(tl.float32)
        matrix *= tl.exp(log_alpha)[:, None]
        change = beta[:, None] * (v - tl.sum(k * matrix, 0)[None, :])
        matrix += k * change
        found = tl.sum(q * matrix, 0)[None, :]
        z_at = z_ptr + token[:, None] * z_stride + head * VALUES + value[None, :]
        z = tl.load(z_at, mask=is_value[None, :], other=0.0).to(tl.float32)
        at = out_ptr + (token * HEADS + head)[:, None] * VALUES + value[None, :]
        tl.store(at, gated_norm(found, z, weight, eps, VALUES, dtype), mask=is_value[None, :])
        keep_matrix(matrix, matrices_ptr, slot_stride, cell, is_cell, snapshots_ptr + start + index)
    tl.store(matrices_ptr + slot * slot_stride + cell, matrix, mask=is_cell)


def delta_chunks_triton(
    qkv: Tensor,
    z: Tensor,
    ba: Tensor,
    net: DeltaNet,
    matrices: Tensor,
    step: StepStates,
    out: Tensor,
    first: int,
    is_exact: bool,
) -> None:
    """Fill `out` from token `first` on, with which the step's requests begin. qkv: after the convolution."""
    meta, device, num_tokens = step.meta, qkv.device, qkv.shape[0]
    heads, keys, values = net.num_value_heads, net.key_dim, net.value_dim
    out[first:].zero_()  # padding has tokens, too, and what they are must be numbers
    block_keys, block_values = max(16, next_power_of_2(keys)), max(16, next_power_of_2(values))
    shape = {"HEADS": heads, "KEYS": keys, "VALUES": values, "BLOCK_KEYS": block_keys}
    both = {**shape, "KEY_HEADS": net.num_key_heads, "L2_EPS": L2_EPS, "BLOCK_VALUES": block_values}
    lens = step.rows, meta.query_start_loc, meta.seq_lens
    if is_exact:
        launch(
            _steps_kernel, (meta.num_reqs, heads), device,
            qkv, z, ba, net.decay, net.dt_bias, net.norm_weight, matrices, *lens, step.snapshots, out,
            qkv.stride(0), z.stride(0), ba.stride(0), matrices.stride(0), net.eps, **both, num_warps=8,
        )  # fmt: skip
        return
    faded_keys, takes = (qkv.new_empty(num_tokens, heads, keys) for _ in range(2))
    changes = qkv.new_empty(num_tokens, heads, values)
    num_places = num_tokens // CHUNK + 2 * meta.num_reqs
    befores = qkv.new_empty(num_places, heads, keys, values)
    faded = qkv.new_empty(num_places, heads, dtype=torch.float32)
    max_chunks = cdiv(meta.max_query_len - 1, CHUNK) + 1
    launch(
        _solve_chunks_kernel, (meta.num_reqs * max_chunks, heads), device,
        qkv, ba, net.decay, net.dt_bias, *lens, faded_keys, takes, changes, faded, max_chunks,
        qkv.stride(0), ba.stride(0), **both, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    launch(
        _pass_chunks_kernel, (meta.num_reqs, heads, cdiv(values, COLUMNS)), device,
        faded_keys, takes, changes, faded, befores, matrices, *lens, step.snapshots, matrices.stride(0),
        **shape, CHUNK=CHUNK, COLUMNS=COLUMNS, num_warps=4, num_stages=2,
    )  # fmt: skip
    launch(
        _ask_chunks_kernel, (meta.num_reqs * max_chunks, heads), device,
        qkv, z, ba, net.decay, net.dt_bias, net.norm_weight, changes, befores, *lens, out, max_chunks,
        qkv.stride(0), z.stride(0), ba.stride(0), net.eps, **both, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
