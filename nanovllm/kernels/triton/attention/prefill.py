"""Paged prefill attention in Triton: queries in tiles of rows, each one program a KV head.

Owns how attention of many queries runs on a GPU. Invariant: as in `paged_attention.py`: which program works on what is
found on the device.

A program's time is the number of keys its last query sees, from one tile of them to thousands. So the tiles of queries
of all requests are put in order once a step, those with the most keys first, and what is left at the end is short
("longest processing time first", Graham, 1969). The heads of one tile of queries follow each other. The query heads
that share a KV head are rows of one program, so that a key is loaded once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.cells import data_of, from_halves, in_halves, pairs_of
from nanovllm.kernels.triton.attention.tiles import (
    attend_tiles,
    blocks_of_tile,
    fence_tile_loads,
    launch_options,
    layer_arguments,
    start_softmax,
    tile_descriptor,
)
from nanovllm.kernels.triton.common.device_limits import has_large_shared_memory, has_warp_groups
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, coarse_size, next_power_of_2

PLAN_PROGRAMS = 32  # tiles of queries that one program of the planning kernel puts in order
LONG_PROMPT = 1024  # tokens to compute, in the mean of a step's prompts


@dataclass(frozen=True)
class PrefillConfig:
    """Shape of the prefill kernel: rows (query tokens x heads of a group), keys per tile, pipeline depth, warps,
    programs per multiprocessor.

    tile_loads: by the tensor memory accelerator where `tile_descriptor` allows.
    """

    rows: int = 64
    tile: int = 64
    num_stages: int = 3
    num_warps: int = 4
    occupancy: int = 2
    tile_loads: bool = True


@dataclass(frozen=True)
class PrefillPlan:
    """The order of one step's tiles of queries; serves every layer.

    order [n, 2] int32: request and first query of the request, or -1 and anything where no tile is left.
    """

    order: Tensor
    config: PrefillConfig


def prefill_config(q: Tensor, kv_cache: Tensor, mean_query_len: int) -> PrefillConfig:
    """Measured on an H200 and an H100 with prompts of 2,048 tokens; steps with many short prompts took longer with
    tiles loaded whole. float32 is exact rather than fast.
    """
    if kv_cache.shape[4] > 256:
        is_for_groups = has_warp_groups(kv_cache.device) and kv_cache.dtype == q.dtype and q.dtype != torch.float32
        rows, tile = (64, 32) if is_for_groups else (32, 16)
        return PrefillConfig(rows, tile, num_stages=1, num_warps=8, occupancy=1, tile_loads=False)
    if q.dtype == torch.float32:
        return PrefillConfig(rows=32, tile=32, num_stages=1, occupancy=1, tile_loads=False)
    if kv_cache.shape[4] > 128:
        if has_large_shared_memory(kv_cache.device):
            return PrefillConfig(num_stages=2, tile_loads=False)
        return PrefillConfig(tile=32, num_stages=1, tile_loads=False)
    return PrefillConfig(tile_loads=mean_query_len >= LONG_PROMPT)


@triton.jit(
    do_not_specialize=["first_req", "num_reqs", "num_programs"], do_not_specialize_on_alignment=["query_start_ptr"]
)
def _plan_prefill_kernel(
    query_start_ptr,
    seq_lens_ptr,
    order_ptr,
    first_req,
    num_reqs,
    num_programs,
    TOKENS: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    req = first_req + tl.arange(0, BLOCK_REQS)
    valid = req < num_reqs
    start = tl.load(query_start_ptr + req, mask=valid, other=0)
    query_len = tl.load(query_start_ptr + req + 1, mask=valid, other=0) - start
    seq_len = tl.load(seq_lens_ptr + req, mask=valid, other=0)
    tiles = tl.cdiv(query_len, TOKENS)
    tile_end = tl.cumsum(tiles, axis=0)

    program = tl.program_id(0) * BLOCK_PROGRAMS + tl.arange(0, BLOCK_PROGRAMS)
    has_tile = program < tl.sum(tiles, axis=0)
    owner = first_req + tl.sum(((tile_end[None, :] <= program[:, None]) & valid[None, :]).to(tl.int32), axis=1)
    is_owner = req[None, :] == owner[:, None]
    tile = program - tl.sum(tl.where(is_owner, (tile_end - tiles)[None, :], 0), axis=1)
    owner_query_len = tl.sum(tl.where(is_owner, query_len[None, :], 0), axis=1)
    owner_seq_len = tl.sum(tl.where(is_owner, seq_len[None, :], 0), axis=1)
    keys = owner_seq_len - owner_query_len + tl.minimum((tile + 1) * TOKENS, owner_query_len)

    # Each request has so many tiles that see fewer keys, or as many and the request comes behind this one.
    bound = keys[:, None] - (req[None, :] < owner[:, None]).to(tl.int32)
    whole = tl.maximum(bound - (seq_len - query_len)[None, :], 0) // TOKENS
    behind = tl.where(bound >= seq_len[None, :], tiles[None, :], tl.minimum(whole, tiles[None, :]))
    place = tl.where(has_tile, tl.sum(tiles[None, :] - behind, axis=1), program)
    mask = program < num_programs
    tl.store(order_ptr + place * 2, tl.where(has_tile, owner, -1), mask=mask)
    tl.store(order_ptr + place * 2 + 1, tile * TOKENS, mask=mask)


def plan_prefill(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    first_req: int,
    q: Tensor,
    cache: LayerCache,
    config: PrefillConfig | None = None,
) -> PrefillPlan:
    """Plans requests first_req .. n - 1 of a step; those before are decodes, with a row each. query_start_loc [n + 1],
    seq_lens [n] int32, read on the device.

    Of q and the cache only shapes, strides, dtype and device count.
    """
    num_reqs = seq_lens.shape[0]
    config = config or prefill_config(q, cache.data, (q.shape[0] - first_req) // (num_reqs - first_req))
    group = q.shape[1] // cache.data.shape[2]
    tokens = rows_of_program(config, group) // group
    num_programs = (q.shape[0] - first_req) // tokens + num_reqs - first_req  # a tile less than full for each request
    order = torch.empty((num_programs, 2), dtype=torch.int32, device=q.device)
    launch(
        _plan_prefill_kernel, (cdiv(num_programs, PLAN_PROGRAMS),), q.device,
        query_start_loc, seq_lens, order, first_req, num_reqs, num_programs, TOKENS=tokens,
        BLOCK_REQS=coarse_size(num_reqs - first_req), BLOCK_PROGRAMS=PLAN_PROGRAMS, num_warps=8,
    )  # fmt: skip
    return PrefillPlan(order, config)


def rows_of_program(config: PrefillConfig, group: int) -> int:
    return max(config.rows, next_power_of_2(group))


@triton.jit
def load_queries(
    q_ptr, query_start, query_len, first_query, head, q_stride_token, q_stride_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Queries first_query .. of a request under one KV head, as rows: q, of each row its token and its head, and which
    elements there are."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    query = first_query + row // GROUP
    query_head = head * GROUP + row % GROUP
    is_query = (row < ROWS // GROUP * GROUP) & (query < query_len)
    row_mask = is_query[:, None] & (dim < HEAD_DIM)[None, :]
    token = (query_start + query).to(tl.int64)
    q_offset = token * q_stride_token + query_head * q_stride_head
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=row_mask, other=0.0)
    return q, token, query_head, row_mask


@triton.jit
def attend_keys(
    top, norm, acc, q, cache_ptr, pairs_ptr, cache_desc, table_ptr, query_position, begin, end,
    whole_from, whole_to, seq_len, head,
    cache_stride_kv, STRIDE_BLOCK: tl.constexpr, STRIDE_HEAD: tl.constexpr, STRIDE_TOKEN: tl.constexpr, scale,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, NUM_STAGES: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """`attend_tiles` for tiles begin .. end. APART: the one with the last token apart, so that the others need no mask;
    where there are few, it is not worth the pause before it."""
    whole_end = begin
    q, acc = in_halves(q, pairs_ptr), in_halves(acc, pairs_ptr)
    if APART:
        whole_end = tl.maximum(tl.minimum(end, seq_len // TILE), begin)
        blocks = blocks_of_tile(table_ptr, begin * TILE, seq_len, TILE, BLOCK_SIZE)
        top, norm, acc = attend_tiles(
            top, norm, acc, q, cache_ptr, pairs_ptr, cache_desc, table_ptr, blocks, query_position, begin, whole_end,
            whole_from, whole_to, seq_len, head,
            cache_stride_kv, STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN, scale,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, False, NUM_STAGES,
        )  # fmt: skip
        whole_from, whole_to = end, end
    blocks = blocks_of_tile(table_ptr, whole_end * TILE, seq_len, TILE, BLOCK_SIZE)
    top, norm, acc = attend_tiles(
        top, norm, acc, q, cache_ptr, pairs_ptr, cache_desc, table_ptr, blocks, query_position, whole_end, end,
        whole_from, whole_to, seq_len, head, cache_stride_kv, STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN, scale,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, True, 2 if APART else NUM_STAGES,
    )  # fmt: skip
    return top, norm, from_halves(acc, pairs_ptr)


@triton.jit
def store_rows(
    out_ptr, norm, acc, token, query_head, row_mask,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    result = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    place = ((token * NUM_HEADS + query_head) * HEAD_DIM)[:, None] + tl.arange(0, BLOCK_DIM)[None, :]
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["query_start_ptr"])
def _prefill_kernel(
    q_ptr,
    cache_ptr,
    pairs_ptr,
    cache_desc,
    sinks_ptr,
    out_ptr,
    query_start_ptr,
    seq_lens_ptr,
    table_ptr,
    order_ptr,
    table_stride,
    q_stride_token,
    q_stride_head,
    cache_stride_kv,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
        if cache_desc is not None:
            fence_tile_loads()
    head = tl.program_id(0) % NUM_KV_HEADS
    place = tl.program_id(0) // NUM_KV_HEADS
    req = tl.load(order_ptr + place * 2)
    first_query = tl.load(order_ptr + place * 2 + 1)
    if req < 0:
        return

    seq_len = tl.load(seq_lens_ptr + req)
    query_start = tl.load(query_start_ptr + req)
    query_len = tl.load(query_start_ptr + req + 1) - query_start
    q, token, query_head, row_mask = load_queries(
        q_ptr, query_start, query_len, first_query, head, q_stride_token, q_stride_head,
        GROUP, HEAD_DIM, BLOCK_DIM, ROWS,
    )  # fmt: skip
    row = tl.arange(0, ROWS)
    first_position = seq_len - query_len + first_query
    query_position = (first_position + row // GROUP)[:, None]
    end = tl.cdiv(tl.minimum(first_position + TOKENS, seq_len), TILE)
    table_ptr += req.to(tl.int64) * table_stride

    top, norm, acc = start_softmax(sinks_ptr, query_head, row < TOKENS * GROUP, BLOCK_DIM)
    begin, whole_from, whole_to = 0, 0, tl.maximum(first_position + 1, 0) // TILE
    if WINDOW:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE
        whole_from = tl.cdiv(tl.maximum(first_position + TOKENS - WINDOW, 0), TILE)
    top, norm, acc = attend_keys(
        top, norm, acc, q, cache_ptr, pairs_ptr, cache_desc, table_ptr, query_position, begin, end,
        whole_from, whole_to, seq_len, head,
        cache_stride_kv, STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN, scale,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, NUM_STAGES, True,
    )  # fmt: skip
    store_rows(out_ptr, norm, acc, token, query_head, row_mask, NUM_KV_HEADS * GROUP, HEAD_DIM, BLOCK_DIM)


def prefill_attention(
    q: Tensor,
    cache: LayerCache,
    out: Tensor,
    meta: AttentionMetadata,
    plan: PrefillPlan,
    shape: AttentionShape,
    sinks: Tensor | None = None,
) -> None:
    """Writes the rows of the requests planned in the contiguous `out`. sinks: see `kernels.paged_attention`."""
    config, data, block_table = plan.config, data_of(cache), meta.block_table
    launch(
        _prefill_kernel, (plan.order.shape[0] * shape.num_kv_heads,), q.device,
        q, data, pairs_of(cache), tile_descriptor(data, config.tile) if config.tile_loads else None, sinks,
        out, meta.query_start_loc, meta.seq_lens, block_table, plan.order, block_table.stride(0),
        q.stride(0), q.stride(1), *data.stride()[:4],
        **layer_arguments(shape, cache.block_size), TILE=config.tile, WINDOW=shape.window or 0,
        ROWS=rows_of_program(config, shape.num_heads // shape.num_kv_heads),
        **launch_options(config.num_stages, config.num_warps, config.occupancy),
    )  # fmt: skip
