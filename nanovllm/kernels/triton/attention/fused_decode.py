"""Fused QKV-RoPE-store decode attention in Triton: a few decodes straight from the QKV product.

Owns the decode kernel for few requests, which does the work of `qkv_rope_store.py` as well; the ranges, and what a
program leaves, are those of `decode.py`. Invariant: nobody reads a cell of the cache that this kernel writes.

With few requests a step is made of waiting, for one kernel and then for the next. What the cache holds is settled since
the step before, all but the new token. So a program asks for its first tile while the product ahead still runs, as
others do for weights (`launch.py`). Then it makes its queries. Whoever has the end of an item makes the new token's key
and value, too: it stores them, and takes them into its softmax from registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.triton.attention.cells import (
    codes_of,
    data_of,
    from_halves,
    in_halves,
    load_pairs,
    numbers_of,
    pairs_of,
    scale_bits,
    size_bits,
)
from nanovllm.kernels.triton.attention.decode import decode_arguments, store_output_or_partial
from nanovllm.kernels.triton.attention.decode_plan import DecodePlan, block_at, next_item, range_of_program, tiles_of
from nanovllm.kernels.triton.attention.tiles import (
    LOWEST,
    apply_softcap,
    attend_tile,
    attend_tiles,
    blocks_of_tile,
    launch_options,
    load_tile,
    start_softmax,
)
from nanovllm.kernels.triton.common.launch import has_dependent_launch, launch
from nanovllm.kernels.triton.linear.parts import normalize


@triton.jit
def _load_pairs(ptr, mask, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PAIRED: tl.constexpr):
    """Of each row, [.., BLOCK_DIM]: its elements and, if PAIRED, in the same places what they are rotated with."""
    HALF: tl.constexpr = HEAD_DIM // 2
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    x = tl.load(ptr + dim, mask=mask, other=0.0)
    other = x
    if PAIRED:
        other = tl.load(ptr + tl.where(dim < HALF, dim + HALF, dim - HALF), mask=mask, other=0.0)
    return x, other


@triton.jit
def _norm_and_rotate(
    x, other, weight, other_weight, cos, sin, eps, HEAD_DIM: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr
):
    """Heads, normed and rotated. sin: negative in the first half of a head."""
    if NORM:
        squares = x.to(tl.float32) * x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, axis=1) / HEAD_DIM + eps)[:, None]
        x = normalize(x, scale, weight)
        if ROPE:
            other = normalize(other, scale, other_weight)
    if ROPE:
        x = (x.to(tl.float32) * cos + other.to(tl.float32) * sin).to(x.dtype)
    return x


@triton.jit
def _encode(x, dtype: tl.constexpr):
    """A row [1, BLOCK_DIM] for the cache: its codes, the bits of its scale [1], and what they stand for."""
    x = x.to(tl.float32)
    bits = scale_bits(tl.max(size_bits(x), axis=1), dtype)
    scale = bits.to(tl.float32, bitcast=True)[:, None] + tl.zeros(x.shape, tl.float32)
    codes = codes_of(x, scale, dtype)
    return codes, bits, numbers_of(codes, x) * scale


@triton.jit(do_not_specialize=["num_reqs", "table_stride"])
def _fused_decode_kernel(
    qkv_ptr,
    cache_ptr,
    pairs_ptr,
    sinks_ptr,
    out_ptr,
    seq_lens_ptr,
    table_ptr,
    num_tiles_ptr,
    starts_ptr,
    semaphores_ptr,
    partial_out_ptr,
    partial_stats_ptr,
    cos_sin_ptr,
    slot_ptr,
    q_weight_ptr,
    k_weight_ptr,
    num_reqs,
    table_stride,
    qkv_stride,
    cos_sin_stride,
    cache_stride_kv,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    scale,
    eps,
    ROPE: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COMBINE_COLS: tl.constexpr,
    COMBINE_ROWS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    HALF: tl.constexpr = HEAD_DIM // 2
    CELL: tl.constexpr = cache_ptr.dtype.element_ty
    KNOWN_WINDOW: tl.constexpr = WINDOW - 1 if WINDOW else 0  # of it, what is in the cache
    length, position, end, req, in_request, seq_len, block = range_of_program(starts_ptr, num_tiles_ptr)
    row = tl.arange(0, BLOCK_GROUP)[:, None]
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    row_mask = (row < GROUP) & (dim < HEAD_DIM)
    dim_mask = dim < HEAD_DIM
    q_weight, q_other_weight = 0.0, 0.0
    k_weight, k_other_weight = 0.0, 0.0
    if Q_NORM:
        q_weight, q_other_weight = _load_pairs(q_weight_ptr, dim_mask, HEAD_DIM, BLOCK_DIM, ROPE)
    if K_NORM:
        k_weight, k_other_weight = _load_pairs(k_weight_ptr, dim_mask, HEAD_DIM, BLOCK_DIM, ROPE)
    while position < end:
        lowest, first_tile, tiles = tiles_of(seq_len, 0, TILE, WINDOW)
        head, tile = in_request // tiles, in_request % tiles
        stop = tl.minimum(tile + (end - position), tiles)
        row_table_ptr = table_ptr + req.to(tl.int64) * table_stride
        takes_new = (stop == tiles) & (seq_len > 0)
        known = seq_len - 1  # tokens in the cache
        t = first_tile + tile
        if BLOCK_SIZE % TILE == 0:
            blocks = block
        else:
            blocks = blocks_of_tile(row_table_ptr, t * TILE, known, TILE, BLOCK_SIZE)
        slot = tl.load(slot_ptr + req).to(tl.int64)
        cos, sin = 0.0, 0.0
        if ROPE:
            angle_ptr = cos_sin_ptr + req.to(tl.int64) * cos_sin_stride + dim % HALF
            cos = tl.load(angle_ptr, mask=dim_mask, other=0.0)
            sin = tl.load(angle_ptr + HALF, mask=dim_mask, other=0.0)
            sin = tl.where(dim < HALF, -sin, sin)
        k, v = load_tile(
            cache_ptr, blocks, t, known, head,
            cache_stride_kv, STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN,
            HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, True,
        )  # fmt: skip
        pairs = None
        if pairs_ptr is not None:
            pairs = load_pairs(pairs_ptr, blocks, t, known, head, NUM_KV_HEADS, BLOCK_SIZE, TILE, True)
        if PDL and EARLY:
            tl.extra.cuda.gdc_wait()  # after the first time, nothing is left to wait for
            tl.extra.cuda.gdc_launch_dependents()

        # First all loads, then what is computed from them: one latency.
        row_ptr = qkv_ptr + req.to(tl.int64) * qkv_stride
        k_ptr = row_ptr + (NUM_KV_HEADS * GROUP + head) * HEAD_DIM
        new_mask = takes_new & dim_mask
        q, q_other = _load_pairs(row_ptr + (head * GROUP + row) * HEAD_DIM, row_mask, HEAD_DIM, BLOCK_DIM, ROPE)
        new_k, new_k_other = _load_pairs(k_ptr, new_mask, HEAD_DIM, BLOCK_DIM, ROPE)
        new_v = tl.load(k_ptr + NUM_KV_HEADS * HEAD_DIM + dim, mask=new_mask, other=0.0)
        q = _norm_and_rotate(q, q_other, q_weight, q_other_weight, cos, sin, eps, HEAD_DIM, Q_NORM, ROPE)
        new_k = _norm_and_rotate(new_k, new_k_other, k_weight, k_other_weight, cos, sin, eps, HEAD_DIM, K_NORM, ROPE)
        stored_k, stored_v = new_k, new_v
        if pairs_ptr is None:
            stored_k, stored_v = new_k.to(CELL), new_v.to(CELL)
            new_k, new_v = stored_k.to(tl.float32), stored_v.to(tl.float32)
        else:
            stored_k, k_bits, new_k = _encode(new_k, CELL)
            stored_v, v_bits, new_v = _encode(new_v, CELL)
            cell = ((slot // BLOCK_SIZE) * NUM_KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
            tl.store(pairs_ptr + cell + tl.arange(0, 1), (k_bits >> 16) | v_bits, mask=takes_new & (slot >= 0))
        cell_ptr = cache_ptr + (slot // BLOCK_SIZE) * STRIDE_BLOCK + head * STRIDE_HEAD
        cell_ptr += (slot % BLOCK_SIZE) * STRIDE_TOKEN + dim
        tl.store(cell_ptr, stored_k, mask=new_mask & (slot >= 0))
        tl.store(cell_ptr + cache_stride_kv, stored_v, mask=new_mask & (slot >= 0))
        score = apply_softcap(tl.sum(q.to(tl.float32) * new_k, axis=1), scale, SOFTCAP)
        score = tl.where(takes_new, score * (1.0 if SOFTCAP > 0.0 else scale), LOWEST)

        query = tl.arange(0, BLOCK_GROUP)
        is_first = (query < GROUP) & (tile == 0)
        top, norm, acc = start_softmax(sinks_ptr, head * GROUP + query, is_first, BLOCK_DIM)
        whole_from, whole_to = tl.cdiv(lowest, TILE), known // TILE
        q, acc = in_halves(q, pairs_ptr), in_halves(acc, pairs_ptr)
        top, norm, acc = attend_tile(
            top, norm, acc, q, k, v, pairs, t, known - 1, whole_from, whole_to, scale, TILE, KNOWN_WINDOW, SOFTCAP, CELL
        )
        if t + 1 < first_tile + stop:
            blocks = blocks_of_tile(row_table_ptr, (t + 1) * TILE, known, TILE, BLOCK_SIZE)
            top, norm, acc = attend_tiles(
                top, norm, acc, q, cache_ptr, pairs_ptr, None, row_table_ptr, blocks, known - 1,
                t + 1, first_tile + stop, whole_from, whole_to, known, head,
                cache_stride_kv, STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN, scale,
                NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, KNOWN_WINDOW, SOFTCAP, True, NUM_STAGES,
            )  # fmt: skip
        acc = from_halves(acc, pairs_ptr)
        new_top = tl.maximum(top, score)
        decay = tl.exp2(top - new_top)
        weight = tl.where(takes_new, tl.exp2(score - new_top), 0.0)
        norm = norm * decay + weight
        acc = acc * decay[:, None] + weight[:, None] * new_v
        store_output_or_partial(
            new_top, norm, acc, out_ptr, semaphores_ptr, partial_out_ptr, partial_stats_ptr,
            req, head, tile, stop, tiles, position, length,
            NUM_KV_HEADS, GROUP, BLOCK_GROUP, HEAD_DIM, BLOCK_DIM, COMBINE_COLS, COMBINE_ROWS,
        )  # fmt: skip
        position += stop - tile
        req, in_request, seq_len = next_item(
            req, in_request + stop - tile, seq_len, tiles, seq_lens_ptr, num_reqs, NUM_KV_HEADS
        )
        if BLOCK_SIZE % TILE == 0:
            block = block_at(
                table_ptr, table_stride, req, in_request, seq_len, 0, position < end, TILE, BLOCK_SIZE, WINDOW
            )
    if PDL and EARLY:
        tl.extra.cuda.gdc_wait()  # also without any work: see rule 1 of launch.py
        tl.extra.cuda.gdc_launch_dependents()


def fused_decode(
    qkv: Tensor,
    heads: HeadInputs,
    cache: LayerCache,
    out: Tensor,
    meta: AttentionMetadata,
    plan: DecodePlan,
    shape: AttentionShape,
    sinks: Tensor | None,
    is_settled: bool,
) -> None:
    """Writes the contiguous out [n, num_heads, head_dim], and the new keys and values, for the n requests planned.

    qkv [n, (num_heads + 2 num_kv_heads) * head_dim]. A window is 2 or more. is_settled: an earlier call used the plan,
    so that this one may read it, and the step's lengths and blocks, before it waits for the kernel ahead.
    """
    config = plan.config
    data, block_table = data_of(cache), meta.block_table
    cos_sin, slots, q_weight, k_weight, eps = heads
    launch(
        _fused_decode_kernel, (plan.starts.shape[0],), qkv.device,
        qkv, data, pairs_of(cache), sinks, out, meta.seq_lens, block_table, plan.num_tiles, plan.starts,
        plan.semaphores, plan.partial_out, plan.partial_stats, cos_sin, slots, q_weight, k_weight, plan.num_reqs,
        block_table.stride(0), qkv.stride(0), 0 if cos_sin is None else cos_sin.stride(0), *data.stride()[:4],
        eps=eps, ROPE=cos_sin is not None, Q_NORM=q_weight is not None, K_NORM=k_weight is not None,
        **decode_arguments(shape, cache.block_size, config.num_warps), TILE=config.tile, WINDOW=plan.window or 0,
        EARLY=is_settled and has_dependent_launch(qkv.device),
        **launch_options(config.num_stages, config.num_warps, config.occupancy),
    )  # fmt: skip
