"""The gated delta net over prompts in Triton, CHUNK tokens at a time (Yang et al., 2024 and 2025).

Within a chunk, what its tokens change depends on each other through the products of their keys: a triangular system,
the same whatever the matrix S is before it. Owns the three kernels: the inverses of all chunks' systems side by side; S
through a request's chunks, one after the other; the norm. Invariant: a chunk ends at a multiple of CHUNK in its
context, or where the step's part of it ends, so at the end of a block of CHUNK tokens S can be kept.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.delta_net import CHUNK, L2_EPS, DeltaNet
from nanovllm.kernels.state_types import StepStates
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2

COLUMNS = 32  # of S, that one program takes through a prompt


@triton.jit
def unit_rows(ptr, token, at, is_row, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, L2_EPS: tl.constexpr):
    """Rows of `token`, from number `at` on, at unit length, float32 [CHUNK, BLOCK]."""
    dim = tl.arange(0, BLOCK)
    mask = is_row[:, None] & (dim < DIM)[None, :]
    x = tl.load(ptr + token[:, None] * stride + at + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 1) + L2_EPS)[:, None]


@triton.jit
def gates(ba_ptr, decay_ptr, dt_bias_ptr, token, is_row, head, ba_stride, HEADS: tl.constexpr):
    """beta, and the logarithm of all alphas of the chunk up to each token; what is no row changes nothing."""
    at = ba_ptr + token * ba_stride + head
    b = tl.load(at, mask=is_row, other=0.0).to(tl.float32)
    a = tl.load(at + HEADS, mask=is_row, other=0.0).to(tl.float32) + tl.load(dt_bias_ptr + head)
    softplus = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    log_alpha = tl.where(is_row, -tl.load(decay_ptr + head) * softplus, 0.0)
    return tl.where(is_row, 1.0 / (1.0 + tl.exp(-b)), 0.0), tl.cumsum(log_alpha, 0)


@triton.jit
def inverse(lower, CHUNK: tl.constexpr):
    """Of 1 + lower, where lower is strictly so: blocks of two rows, then pairs of blocks, as (D + O)^-1 is
    D^-1 - D^-1 O D^-1 where O is what the second of each pair has below the first."""
    row, col = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    found = tl.where(row == col, 1.0, 0.0) - tl.where(row // 2 == col // 2, lower, 0.0)
    size = 2
    while size < CHUNK:
        below = (row // (2 * size) == col // (2 * size)) & (row // size != col // size)
        other = tl.dot(found, tl.where(below, lower, 0.0), input_precision="ieee")
        found -= tl.dot(other, found, input_precision="ieee")
        size *= 2
    return found


@triton.jit(do_not_specialize=["max_chunks"])
def _solve_chunks_kernel(
    qkv_ptr,
    ba_ptr,
    decay_ptr,
    dt_bias_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    solved_ptr,
    max_chunks,
    qkv_stride,
    ba_stride,
    KEY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    L2_EPS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    request, chunk, head = tl.program_id(0) // max_chunks, tl.program_id(0) % max_chunks, tl.program_id(1)
    start = tl.load(starts_ptr + request)
    length = tl.load(starts_ptr + request + 1) - start
    first = chunk * CHUNK - (tl.load(seq_lens_ptr + request) - length) % CHUNK
    if tl.load(rows_ptr + request) < 0 or first >= length:
        return
    offset = first + tl.arange(0, CHUNK)
    is_row = (offset >= 0) & (offset < length)
    token = (start + offset).to(tl.int64)
    beta, log_alpha = gates(ba_ptr, decay_ptr, dt_bias_ptr, token, is_row, head, ba_stride, HEADS)
    key_at = (KEY_HEADS + head // (HEADS // KEY_HEADS)) * KEYS
    k = unit_rows(qkv_ptr, token, key_at, is_row, qkv_stride, KEYS, BLOCK_KEYS, L2_EPS)
    dtype = qkv_ptr.dtype.element_ty
    row, col = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    k = k.to(dtype).to(tl.float32)
    products = tl.dot(k, tl.trans(k), input_precision="ieee")  # as the inverse: what is solved has to be exact
    faded = tl.where(row > col, tl.exp(tl.where(row > col, log_alpha[:, None] - log_alpha[None, :], 0.0)), 0.0)
    solved = inverse(beta[:, None] * products * faded, CHUNK)
    tl.store(solved_ptr + (token * HEADS + head)[:, None] * CHUNK + col, solved.to(dtype), mask=is_row[:, None])


@triton.jit
def _pass_chunks_kernel(
    qkv_ptr,
    ba_ptr,
    decay_ptr,
    dt_bias_ptr,
    solved_ptr,
    matrices_ptr,
    rows_ptr,
    starts_ptr,
    seq_lens_ptr,
    snapshots_ptr,
    found_ptr,
    qkv_stride,
    ba_stride,
    slot_stride,
    KEY_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
    L2_EPS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    request, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(rows_ptr + request).to(tl.int64)
    start = tl.load(starts_ptr + request)
    length = tl.load(starts_ptr + request + 1) - start
    if slot < 0 or length == 0:
        return
    before = tl.load(seq_lens_ptr + request) - length
    key, value = tl.arange(0, BLOCK_KEYS), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_key, is_value = key < KEYS, value < VALUES
    cell = (head * KEYS + key[:, None]) * VALUES + value[None, :]
    is_cell = is_key[:, None] & is_value[None, :]
    matrix = tl.load(matrices_ptr + slot * slot_stride + cell, mask=is_cell & (before > 0), other=0.0)
    row, col = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    query_at = head // (HEADS // KEY_HEADS) * KEYS
    dtype = qkv_ptr.dtype.element_ty
    for first in range(-(before % CHUNK), length, CHUNK):
        offset = first + tl.arange(0, CHUNK)
        is_row = (offset >= 0) & (offset < length)
        token = (start + offset).to(tl.int64)
        q = unit_rows(qkv_ptr, token, query_at, is_row, qkv_stride, KEYS, BLOCK_KEYS, L2_EPS) * (KEYS**-0.5)
        k = unit_rows(qkv_ptr, token, KEY_HEADS * KEYS + query_at, is_row, qkv_stride, KEYS, BLOCK_KEYS, L2_EPS)
        beta, log_alpha = gates(ba_ptr, decay_ptr, dt_bias_ptr, token, is_row, head, ba_stride, HEADS)
        here = (token * HEADS + head)[:, None]
        mask = is_row[:, None] & is_value[None, :]
        v_at = qkv_ptr + token[:, None] * qkv_stride + 2 * KEY_HEADS * KEYS + head * VALUES + value[None, :]
        v = tl.load(v_at, mask=mask, other=0.0).to(tl.float32)
        rounded = matrix.to(dtype)
        known = tl.dot(k.to(dtype), rounded, input_precision="ieee") * tl.exp(log_alpha)[:, None]
        solved = tl.load(solved_ptr + here * CHUNK + col, mask=is_row[:, None], other=0.0)
        change = tl.dot(solved, (beta[:, None] * (v - known)).to(dtype), input_precision="ieee").to(dtype)
        scores = tl.dot(q.to(dtype), tl.trans(k.to(dtype)), input_precision="ieee")
        faded = tl.exp(tl.where(row >= col, log_alpha[:, None] - log_alpha[None, :], 0.0))
        scores = tl.where(row >= col, scores * faded, 0.0).to(dtype)
        found = tl.dot((q * tl.exp(log_alpha)[:, None]).to(dtype), rounded, input_precision="ieee")
        found += tl.dot(scores, change, input_precision="ieee")
        tl.store(found_ptr + here * VALUES + value[None, :], found.to(dtype), mask=mask)
        whole = tl.sum(tl.where(tl.arange(0, CHUNK) == CHUNK - 1, log_alpha, 0.0), 0)
        faded_keys = (k * tl.exp(whole - log_alpha)[:, None]).to(dtype)
        matrix = matrix * tl.exp(whole) + tl.dot(tl.trans(faded_keys), change, input_precision="ieee")
        last = tl.minimum(first + CHUNK, length) - 1
        snapshot = tl.load(snapshots_ptr + start + last).to(tl.int64)
        if snapshot >= 0:
            tl.store(matrices_ptr + snapshot * slot_stride + cell, matrix, mask=is_cell)
    tl.store(matrices_ptr + slot * slot_stride + cell, matrix, mask=is_cell)


@triton.jit(do_not_specialize=["num_rows"])
def _gated_norm_kernel(
    found_ptr,
    z_ptr,
    norm_ptr,
    out_ptr,
    num_rows,
    z_stride,
    eps,
    HEADS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    value = tl.arange(0, BLOCK_VALUES)[None, :]
    mask = (row < num_rows) & (value < VALUES)
    weight = tl.load(norm_ptr + value, mask=value < VALUES, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    found = tl.load(found_ptr + row * VALUES + value, mask=mask, other=0.0)
    dtype = found.dtype
    x = found.to(tl.float32)
    x = (x * tl.rsqrt(tl.sum(x * x, 1) / VALUES + eps)[:, None]).to(dtype).to(tl.float32)
    x = (x * weight).to(dtype).to(tl.float32)
    z = tl.load(z_ptr + row // HEADS * z_stride + row % HEADS * VALUES + value, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * VALUES + value, (x * (z / (1.0 + tl.exp(-z)))).to(dtype), mask=mask)


def delta_chunks_triton(
    qkv: Tensor, z: Tensor, ba: Tensor, net: DeltaNet, matrices: Tensor, step: StepStates, out: Tensor, first: int
) -> None:
    """Fill `out` from token `first` on, with which the step's requests begin. qkv: after the convolution."""
    meta, device = step.meta, qkv.device
    heads, keys, values = net.num_value_heads, net.key_dim, net.value_dim
    solved = qkv.new_empty(qkv.shape[0], heads, CHUNK)
    found = qkv.new_zeros(qkv.shape[0], heads * values)  # padding has tokens, too, and what they are must be numbers
    common = {
        **{"KEY_HEADS": net.num_key_heads, "HEADS": heads, "KEYS": keys, "CHUNK": CHUNK, "L2_EPS": L2_EPS},
        "BLOCK_KEYS": max(16, next_power_of_2(keys)),
    }
    lens = step.rows, meta.query_start_loc, meta.seq_lens
    max_chunks = cdiv(meta.max_query_len - 1, CHUNK) + 1
    launch(
        _solve_chunks_kernel, (meta.num_reqs * max_chunks, heads), device,
        qkv, ba, net.decay, net.dt_bias, *lens, solved, max_chunks, qkv.stride(0), ba.stride(0),
        **common, num_warps=4,
    )  # fmt: skip
    launch(
        _pass_chunks_kernel, (meta.num_reqs, heads, cdiv(values, COLUMNS)), device,
        qkv, ba, net.decay, net.dt_bias, solved, matrices, *lens, step.snapshots, found,
        qkv.stride(0), ba.stride(0), matrices.stride(0), **common, VALUES=values, COLUMNS=COLUMNS,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    num_rows, block_rows = (qkv.shape[0] - first) * heads, 8
    launch(
        _gated_norm_kernel, (cdiv(num_rows, block_rows),), device,
        found[first:], z[first:], net.norm_weight, out[first:], num_rows, z.stride(0), net.eps,
        HEADS=heads, VALUES=values, BLOCK_ROWS=block_rows, BLOCK_VALUES=next_power_of_2(values), num_warps=4,
    )  # fmt: skip
