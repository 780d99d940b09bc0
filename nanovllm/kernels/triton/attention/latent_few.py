"""A few decodes over latents in Triton: what stands before attention is one kernel, and what stands behind it another.

    q, kv --product with keys; norm, rotation, store--> queries, cache --`latent_decode.py`--> partial results
          --merge, product with values--> of each head, its values

Owns these two kernels. Each of the steps within them moves little, so what it costs apart is that it begins and ends.
Both ask for their part of the matrix before they wait. Invariant: rounds where the steps apart round.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.triton.attention.cells import data_of
from nanovllm.kernels.triton.attention.latent_decode import (
    AT_ONCE,
    LatentDecodePlan,
    decode_apart,
    merge_partials,
    programs_of_item,
)
from nanovllm.kernels.triton.attention.latent_store import scales_of, store_arguments, store_latent
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, coarse_size, next_power_of_2

MAX_ROWS = 4
KEY_COLS = 64  # numbers of a head's query that a program makes
VALUE_COLS = 16  # and of its values


@triton.jit
def _latent_query_kernel(
    queries_ptr,
    q_ptr,
    q_rope_ptr,
    kv_ptr,
    cos_sin_ptr,
    norm_weight_ptr,
    slot_ptr,
    cache_ptr,
    scales_ptr,
    matrix_ptr,
    queries_stride_token,
    queries_stride_head,
    q_stride_token,
    q_stride_head,
    kv_stride,
    cos_sin_stride,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    eps,
    ROWS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLS: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    IS_NEOX: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """The first programs store a token each, the others have columns of a head's matrix [HEAD_SIZE, RANK]."""
    program = tl.program_id(0)
    if program < ROWS:
        rank = tl.arange(0, BLOCK_RANK)
        weight = tl.load(norm_weight_ptr + rank, mask=rank < RANK, other=0.0)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()  # as in `latent_store.py`
        store_latent(
            program.to(tl.int64), weight, queries_ptr + RANK, q_rope_ptr, kv_ptr, cos_sin_ptr, slot_ptr, cache_ptr,
            scales_ptr, queries_stride_token, queries_stride_head, q_stride_token, q_stride_head, kv_stride,
            cos_sin_stride, STRIDE_BLOCK, STRIDE_TOKEN, eps,
            HAS_ROPE, IS_NEOX, NUM_HEADS, RANK, HALF, BLOCK_SIZE, BLOCK_HEADS, BLOCK_RANK, BLOCK_HALF,
        )  # fmt: skip
        return
    head = (program - ROWS) % NUM_HEADS
    col = (program - ROWS) // NUM_HEADS * COLS + tl.arange(0, COLS)
    key = tl.arange(0, BLOCK_KEY)
    mask = (key < KEY_DIM)[:, None] & (col < RANK)[None, :]
    place = head * (HEAD_SIZE * RANK) + key[:, None] * RANK + col[None, :]
    matrix = tl.load(matrix_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for row in tl.static_range(ROWS):
        q_row_ptr = q_ptr + row * q_stride_token + head * q_stride_head
        q = tl.load(q_row_ptr + key, mask=key < KEY_DIM, other=0.0).to(tl.float32)
        query = tl.sum(matrix * q[:, None], axis=0)
        query_ptr = queries_ptr + row * queries_stride_token + head * queries_stride_head + col
        tl.store(query_ptr, query.to(queries_ptr.dtype.element_ty), mask=col < RANK)


@triton.jit(do_not_specialize=["num_reqs", "num_programs"])
def _latent_value_kernel(
    partial_out_ptr,
    partial_stats_ptr,
    found_ptr,
    matrix_ptr,
    out_ptr,
    seq_lens_ptr,
    num_tiles_ptr,
    num_reqs,
    num_programs,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Some values of one request and head. found [num_reqs, heads, RANK]: of items that one program had by itself."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    req, head = tl.program_id(0), tl.program_id(1)
    rank = tl.arange(0, BLOCK_RANK)
    col = tl.program_id(2) * COLS + tl.arange(0, COLS)
    place = (head * (KEY_DIM + VALUE_DIM) + KEY_DIM + col[:, None]) * RANK + rank[None, :]
    matrix = tl.load(matrix_ptr + place, mask=(col < VALUE_DIM)[:, None] & (rank < RANK)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    dtype = out_ptr.dtype.element_ty
    first, last = programs_of_item(
        seq_lens_ptr, num_tiles_ptr, req, head // GROUP, num_reqs, num_programs, NUM_GROUPS, TILE, BLOCK_REQS
    )
    item = req.to(tl.int64) * NUM_GROUPS * GROUP + head
    if first == last:
        found = tl.load(found_ptr + item * RANK + rank, mask=rank < RANK, other=0.0)
    else:
        found = merge_partials(
            partial_out_ptr, partial_stats_ptr, first, last, head % GROUP, rank, GROUP, RANK, BLOCK_RANK, AT_ONCE
        ).to(dtype)
    values = tl.sum(matrix.to(tl.float32) * found.to(tl.float32)[None, :], axis=1)
    tl.store(out_ptr + item * VALUE_DIM + col, values.to(dtype), mask=col < VALUE_DIM)


def query_few(
    q: Tensor,
    q_rope: Tensor,
    kv: Tensor,
    heads: HeadInputs,
    matrix: Tensor,
    cache: LayerCache,
    is_neox_style: bool,
) -> Tensor:
    """`head_linear` with the keys' part of `matrix`, and `latent_store`. q [n, num_heads, key_dim] and q_rope are parts
    of one tensor; matrix [num_heads, key_dim + value_dim, rank], contiguous. Returns the queries [n, num_heads, rank +
    rope_dim]."""
    (num_rows, num_heads, key_dim), rank = q.shape, matrix.shape[2]
    queries = torch.empty(num_rows, num_heads, rank + q_rope.shape[2], dtype=q.dtype, device=q.device)
    cols = min(KEY_COLS, next_power_of_2(rank))
    cos_sin = heads.cos_sin
    launch(
        _latent_query_kernel, (num_rows + num_heads * cdiv(rank, cols),), q.device,
        queries, q, q_rope, kv, cos_sin, heads.k_norm_weight, heads.slot_mapping, data_of(cache), scales_of(cache),
        matrix, queries.stride(0), queries.stride(1), q.stride(0), q.stride(1), kv.stride(0),
        0 if cos_sin is None else cos_sin.stride(0), cache.data.stride(1), cache.data.stride(3), heads.eps,
        ROWS=num_rows, KEY_DIM=key_dim, BLOCK_KEY=next_power_of_2(key_dim), HEAD_SIZE=matrix.shape[1], COLS=cols,
        **store_arguments(q_rope, heads, cache, is_neox_style), num_warps=4,
    )  # fmt: skip
    return queries


def attend_few(
    queries: Tensor,
    matrix: Tensor,
    cache: LayerCache,
    meta: AttentionMetadata,
    shape: AttentionShape,
    plan: LatentDecodePlan,
    key_dim: int,
    is_settled: bool,
) -> Tensor:
    """Attention of decodes, and `head_linear` with the values' part of `matrix` [num_heads, key_dim + value_dim, rank].
    Returns [n, num_heads * value_dim]. is_settled: as in `latent_decode`."""
    (num_heads, head_size, rank), cut = matrix.shape, plan.cut
    found = queries.new_empty(cut.num_reqs, num_heads, rank)
    arguments = decode_apart(queries, cache, found, meta, plan, shape, is_settled)
    value_dim = head_size - key_dim
    out = queries.new_empty(cut.num_reqs, num_heads * value_dim)
    cols = min(VALUE_COLS, next_power_of_2(value_dim))
    launch(
        _latent_value_kernel, (cut.num_reqs, num_heads, cdiv(value_dim, cols)), queries.device,
        cut.partial_out, cut.partial_stats, found, matrix, out, meta.seq_lens, cut.num_tiles, cut.num_reqs,
        cut.starts.shape[0],
        NUM_GROUPS=plan.num_groups, GROUP=arguments["GROUP"], RANK=rank, BLOCK_RANK=arguments["BLOCK_RANK"],
        KEY_DIM=key_dim, VALUE_DIM=value_dim, TILE=cut.config.tile, COLS=cols, AT_ONCE=AT_ONCE,
        BLOCK_REQS=coarse_size(cut.num_reqs), num_warps=4,
    )  # fmt: skip
    return out
