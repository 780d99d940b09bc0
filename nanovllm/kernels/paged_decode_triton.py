"""Attention of requests with one query token each over the paged cache, cut into equal ranges of tiles of keys.

Owns how decode attention runs on a GPU. Invariant: as in `paged_attention_triton.py`: which program works on what is
found on the device.

Decode reads the whole cache once and computes next to nothing, so all that counts is that every multiprocessor reads
all the time. The keys of a request (a "tile" is TILE of them) under one KV head are an item; all items, end to end, are
cut into equal ranges of tiles, one for each program:

    items      | request 0, head 0 | request 0, head 1 | request 1, head 0          | request 1, head 1  ...
    programs   |    0     |    1     |    2     |    3     |    4     |    5     |

A program that holds an item whole writes its output. Otherwise it leaves a partial softmax, and whoever is last to
leave one for an item adds them up, in the order of the keys ("Flash-Decoding", Dao et al., 2023; the cut as in
"Stream-K", Osama et al., 2023). Ranges have whole numbers of tiles, so that requests of one length are often not cut at
all. The query heads that share a KV head are the rows of one small matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.dependent_launch import has_dependent_launch
from nanovllm.kernels.paged_tiles_triton import (
    LOWEST,
    attend,
    blocks_of_tile,
    exponents,
    max_registers,
    num_multiprocessors,
    offsets_of_tile,
)

PLAN_PROGRAMS = 32  # ranges that one program of the planning kernel finds
COMBINE_ELEMENTS = 1024  # floats of partial outputs in flight at a time
FEW_REQUESTS = 32
LINE = tl.constexpr(128)  # bytes of a cache line


@dataclass(frozen=True)
class DecodeConfig:
    """Shape of the decode kernel: keys per tile, pipeline depth, warps, programs per multiprocessor.

    prefetch: ask for the first tile while the kernel ahead still runs, where the device can.
    """

    tile: int = 64
    num_stages: int = 2
    num_warps: int = 4
    occupancy: int = 4
    prefetch: bool = False


@dataclass(frozen=True)
class DecodePlan:
    """How the decodes of one step are cut into ranges, and room for partial results; serves every layer in turn.

    tile_start [n + 1]: tiles before each request, under one KV head. first_request [programs]: where each range begins.
    arrived [n * num_kv_heads]: partials left so far, 0 between calls.
    partial_out [programs, 2, group, head_dim], partial_stats [programs, 2, 2, group] (maximum, sum): float32.
    """

    tile_start: Tensor
    first_request: Tensor
    arrived: Tensor
    partial_out: Tensor
    partial_stats: Tensor
    window: int | None
    config: DecodeConfig


def decode_config(head_dim: int, dtype: torch.dtype, num_reqs: int) -> DecodeConfig:
    """Many requests: as many bytes on their way as can be. Few: no program should wait long for anything.

    Measured on an H200 with contexts of 384 to 2,000 tokens. Wide heads and wide types take smaller tiles.
    """
    if dtype == torch.float32:
        return DecodeConfig(tile=32, num_stages=2, occupancy=1)
    tile = 32 if head_dim > 128 else 64
    if num_reqs <= FEW_REQUESTS:
        return DecodeConfig(tile, num_stages=2 if num_reqs <= 4 else 3, occupancy=2, prefetch=True)
    return DecodeConfig(tile)


@triton.jit(do_not_specialize=["num_reqs", "num_programs"])
def _plan_decode_kernel(
    seq_lens_ptr,
    tile_start_ptr,
    first_request_ptr,
    arrived_ptr,
    num_reqs,
    num_programs,
    NUM_KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    req = tl.arange(0, BLOCK_REQS)
    valid = req < num_reqs
    seq_len = tl.load(seq_lens_ptr + req, mask=valid, other=0)
    first_tile = tl.maximum(seq_len - WINDOW, 0) // TILE if WINDOW else 0
    tiles = tl.maximum(tl.cdiv(seq_len, TILE) - first_tile, 1)  # padding, too, needs a program that writes its zeros
    tiles = tl.where(valid, tiles, 0)
    tile_end = tl.cumsum(tiles, axis=0)
    if tl.program_id(0) == 0:
        tl.store(tile_start_ptr, 0)
        tl.store(tile_start_ptr + 1 + req, tile_end, mask=valid)
        for part in range(NUM_KV_HEADS):
            tl.store(arrived_ptr + part * num_reqs + req, 0, mask=valid)
    total = tl.sum(tiles, axis=0).to(tl.int64) * NUM_KV_HEADS
    program = tl.program_id(0) * BLOCK_PROGRAMS + tl.arange(0, BLOCK_PROGRAMS)
    begin = program * tl.cdiv(total, num_programs)
    before = (tile_end[None, :].to(tl.int64) * NUM_KV_HEADS <= begin[:, None]) & valid[None, :]
    first_request = tl.minimum(tl.sum(before.to(tl.int32), axis=1), num_reqs - 1)
    tl.store(first_request_ptr + program, first_request, mask=program < num_programs)


def plan_decode(
    seq_lens: Tensor, q: Tensor, kv_cache: Tensor, window: int | None, config: DecodeConfig | None = None
) -> DecodePlan:
    """Plans one step of decodes for layers that share this `window`. seq_lens [n] int32, read on the device.

    Of q and kv_cache only shapes, dtype and device count. Calls in one stream may share the plan, concurrent ones not.
    """
    num_reqs, num_kv_heads = seq_lens.shape[0], kv_cache.shape[2]
    group, head_dim = q.shape[1] // num_kv_heads, q.shape[2]
    config = config or decode_config(head_dim, q.dtype, num_reqs)
    num_programs = config.occupancy * num_multiprocessors(q.device)

    def room(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    plan = DecodePlan(
        tile_start=room(torch.int32, num_reqs + 1),
        first_request=room(torch.int32, num_programs),
        arrived=room(torch.int32, num_reqs * num_kv_heads),
        partial_out=room(torch.float32, num_programs, 2, group, head_dim),
        partial_stats=room(torch.float32, num_programs, 2, 2, group),
        window=window,
        config=config,
    )
    pdl = has_dependent_launch(q.device)
    _plan_decode_kernel[(triton.cdiv(num_programs, PLAN_PROGRAMS),)](
        seq_lens, plan.tile_start, plan.first_request, plan.arrived, num_reqs, num_programs,
        NUM_KV_HEADS=num_kv_heads, WINDOW=window or 0, TILE=config.tile,
        BLOCK_REQS=triton.next_power_of_2(num_reqs), BLOCK_PROGRAMS=PLAN_PROGRAMS, PDL=pdl, num_warps=8,
        launch_pdl=pdl,
    )  # fmt: skip
    return plan


@triton.jit
def _find(
    position, req, seq_lens_ptr, table_ptr, tile_start_ptr, table_stride,
    NUM_KV_HEADS: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The item at `position` of all tiles, which is in request `req`.

    Its head; which of its tiles `position` is; how many it has; the number of the first of them in the context; the
    context's length; the first token in the window; the request's row of the table.
    """
    item_tile_start = tl.load(tile_start_ptr + req)
    tiles = tl.load(tile_start_ptr + req + 1) - item_tile_start
    seq_len = tl.load(seq_lens_ptr + req)
    lowest = tl.maximum(seq_len - WINDOW, 0) if WINDOW else 0
    in_request = (position - item_tile_start.to(tl.int64) * NUM_KV_HEADS).to(tl.int32)
    row_table_ptr = table_ptr + req.to(tl.int64) * table_stride
    return in_request // tiles, in_request % tiles, tiles, lowest // TILE, seq_len, lowest, row_table_ptr


@triton.jit(do_not_specialize=["num_reqs", "table_stride"])
def _decode_kernel(
    q_ptr,
    cache_ptr,
    out_ptr,
    seq_lens_ptr,
    table_ptr,
    tile_start_ptr,
    first_request_ptr,
    arrived_ptr,
    partial_out_ptr,
    partial_stats_ptr,
    num_reqs,
    table_stride,
    q_stride_token,
    q_stride_head,
    cache_stride_kv,
    cache_stride_block,
    cache_stride_head,
    cache_stride_token,
    scale,
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
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL and not PREFETCH:
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    req = tl.load(first_request_ptr + program)
    total = tl.load(tile_start_ptr + num_reqs).to(tl.int64) * NUM_KV_HEADS
    length = tl.cdiv(total, tl.num_programs(0))
    position = program * length
    end = tl.minimum(position + length, total)
    if PREFETCH:
        if position < end:
            head, tile, tiles, first_tile, seq_len, lowest, row_table_ptr = _find(
                position, req, seq_lens_ptr, table_ptr, tile_start_ptr, table_stride, NUM_KV_HEADS, TILE, WINDOW
            )
            first_token = (first_tile + tile) * TILE
            blocks = blocks_of_tile(row_table_ptr, first_token, seq_len, TILE, BLOCK_SIZE)
            offset = offsets_of_tile(
                blocks, first_token, cache_stride_block, cache_stride_token, cache_stride_head, head,
                TILE, BLOCK_SIZE,
            )  # fmt: skip
            _prefetch_tile(cache_ptr, offset, cache_stride_kv, HEAD_DIM, BLOCK_DIM)
        tl.extra.cuda.gdc_wait()

    row = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    row_mask = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    while position < end:
        head, tile, tiles, first_tile, seq_len, lowest, row_table_ptr = _find(
            position, req, seq_lens_ptr, table_ptr, tile_start_ptr, table_stride, NUM_KV_HEADS, TILE, WINDOW
        )
        stop = tl.minimum(tile + (end - position), tiles).to(tl.int32)
        q_offset = req.to(tl.int64) * q_stride_token + (head * GROUP + row) * q_stride_head
        q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=row_mask, other=0.0)

        top = tl.full([BLOCK_GROUP], LOWEST, tl.float32)
        norm = tl.zeros([BLOCK_GROUP], tl.float32)
        acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
        top, norm, acc = attend(
            top, norm, acc, q, cache_ptr, None, row_table_ptr, seq_len - 1, first_tile + tile, first_tile + stop,
            tl.cdiv(lowest, TILE), seq_len // TILE, seq_len, head,
            cache_stride_kv, cache_stride_block, cache_stride_head, cache_stride_token, scale,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, True, NUM_STAGES,
        )  # fmt: skip

        out_row_ptr = out_ptr + (req.to(tl.int64) * NUM_KV_HEADS + head) * GROUP * HEAD_DIM
        if stop - tile == tiles:
            result = acc / tl.where(norm > 0, norm, 1.0)[:, None]
            tl.store(
                out_row_ptr + row[:, None] * HEAD_DIM + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=row_mask
            )
        else:
            # A range holds the end of an item in slot 0 (or its middle), the beginning of one in slot 1.
            slot = program * 2 + (tile == 0).to(tl.int32)
            tl.store(
                partial_out_ptr + slot.to(tl.int64) * GROUP * HEAD_DIM + row[:, None] * HEAD_DIM + dim[None, :],
                acc,
                mask=row_mask,
            )
            tl.store(partial_stats_ptr + slot * 2 * GROUP + row, top, mask=row < GROUP)
            tl.store(partial_stats_ptr + slot * 2 * GROUP + GROUP + row, norm, mask=row < GROUP)
            item_begin = position - tile
            first = (item_begin // length).to(tl.int32)
            last = ((item_begin + tiles - 1) // length).to(tl.int32)
            tl.debug_barrier()  # every warp's stores come before the one thread's release
            counter_ptr = arrived_ptr + req * NUM_KV_HEADS + head
            if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == last - first:
                tl.store(counter_ptr, 0)
                _combine(
                    partial_out_ptr, partial_stats_ptr, out_row_ptr, first, last,
                    GROUP, HEAD_DIM, BLOCK_DIM, COMBINE_COLS, COMBINE_ROWS,
                )  # fmt: skip
        position += stop - tile
        req += ((stop == tiles) & (head == NUM_KV_HEADS - 1)).to(tl.int32)


@triton.jit
def _prefetch_tile(cache_ptr, offset, cache_stride_kv, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Brings a tile's keys and values into L2, also while the newest of them are still written: L2 is what all
    multiprocessors see."""
    LINE_ELEMENTS: tl.constexpr = LINE * 8 // cache_ptr.dtype.element_ty.primitive_bitwidth
    line = tl.minimum(tl.arange(0, BLOCK_DIM // LINE_ELEMENTS), (HEAD_DIM - 1) // LINE_ELEMENTS)
    lines_ptr = cache_ptr + offset[:, None] + (line * LINE_ELEMENTS)[None, :]
    _prefetch(lines_ptr)
    _prefetch(lines_ptr + cache_stride_kv)


@triton.jit
def _prefetch(ptr):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _combine(
    partial_out_ptr,
    partial_stats_ptr,
    out_ptr,
    first,
    last,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds up the partials that programs first .. last left for one item, ROWS of them in flight at a time."""
    col = tl.arange(0, COLS)
    row, dim = col // BLOCK_DIM, col % BLOCK_DIM
    col_mask = (row < GROUP) & (dim < HEAD_DIM)
    top = tl.full([COLS], LOWEST, tl.float32)
    norm = tl.zeros([COLS], tl.float32)
    acc = tl.zeros([COLS], tl.float32)
    for start in range(first, last + 1, ROWS):
        program = start + tl.arange(0, ROWS)
        slot = program * 2 + (program == first).to(tl.int32)
        mask = (program <= last)[:, None] & col_mask[None, :]
        # Other multiprocessors wrote these: .cg reads past this one's L1 cache.
        stats_ptr = partial_stats_ptr + slot[:, None] * 2 * GROUP + row[None, :]
        tops = tl.load(stats_ptr, mask=mask, other=LOWEST, cache_modifier=".cg")
        norms = tl.load(stats_ptr + GROUP, mask=mask, other=0.0, cache_modifier=".cg")
        out_offset = slot.to(tl.int64)[:, None] * (GROUP * HEAD_DIM) + (row * HEAD_DIM + dim)[None, :]
        outs = tl.load(partial_out_ptr + out_offset, mask=mask, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        weights = tl.exp2(tops - new_top[None, :])
        decay = tl.exp2(top - new_top)
        norm = norm * decay + tl.sum(norms * weights, axis=0)
        acc = acc * decay + tl.sum(outs * weights, axis=0)
        top = new_top
    result = acc / tl.where(norm > 0, norm, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + dim, result.to(out_ptr.dtype.element_ty), mask=col_mask)


def decode_attention(
    q: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    plan: DecodePlan,
    scale: float,
    softcap: float | None = None,
    is_settled: bool = False,
) -> None:
    """Writes rows 0 .. n - 1 of the contiguous `out` for the n requests planned; query i belongs to request i.

    is_settled: plan, lengths and blocks were written before the kernel ahead of this one started, so that this one may
    read them before it waits for that one.
    """
    config, num_reqs = plan.config, plan.tile_start.shape[0] - 1
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    group = q.shape[1] // num_kv_heads
    block_dim = max(16, triton.next_power_of_2(head_dim))  # tl.dot takes no less
    combine_cols = triton.next_power_of_2(group) * block_dim
    exponent_scale, exponent_cap = exponents(scale, softcap)
    pdl = has_dependent_launch(q.device)
    _decode_kernel[(plan.first_request.shape[0],)](
        q, kv_cache, out, seq_lens, block_table, plan.tile_start, plan.first_request,
        plan.arrived, plan.partial_out, plan.partial_stats, num_reqs,
        block_table.stride(0), q.stride(0), q.stride(1), *kv_cache.stride()[:4], exponent_scale,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, BLOCK_GROUP=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, BLOCK_DIM=block_dim, BLOCK_SIZE=block_size, TILE=config.tile, WINDOW=plan.window or 0,
        SOFTCAP=exponent_cap, COMBINE_COLS=combine_cols, COMBINE_ROWS=max(1, COMBINE_ELEMENTS // combine_cols),
        PREFETCH=config.prefetch and is_settled and pdl and block_dim * q.element_size() >= LINE, PDL=pdl,
        NUM_STAGES=config.num_stages, num_warps=config.num_warps, launch_pdl=pdl,
        maxnreg=max_registers(config.occupancy, config.num_warps),
    )  # fmt: skip
