"""Triton twin of `paged_attention.py`: one kernel for decodes, one for everything longer.

Owns how attention runs on a GPU. Invariant: lengths and blocks are read on the device, and every grid follows from
sizes known on the host, so a call can be captured in a CUDA graph and replayed with other lengths.

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
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.dependent_launch import has_dependent_launch

if TYPE_CHECKING:
    from nanovllm.kernels.paged_attention import PagedBatch

LOG2_E = 1.4426950408889634
# A running maximum starts here rather than at -inf, so that differences of maxima are never inf - inf.
LOWEST = tl.constexpr(-1.0e30)
PLAN_PROGRAMS = 32  # ranges that one program of the planning kernel finds
REGISTERS = 65536  # of a multiprocessor
COMBINE_ELEMENTS = 1024  # floats of partial outputs in flight at a time
FEW_REQUESTS = 32
LINE = tl.constexpr(128)  # bytes of a cache line


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
    tile: int
    window: int | None


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
class PrefillConfig:
    """Shape of the prefill kernel: rows (query tokens x heads of a group), keys per tile, pipeline depth, warps."""

    rows: int = 64
    tile: int = 64
    num_stages: int = 3
    num_warps: int = 4


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


def prefill_config(head_dim: int, dtype: torch.dtype) -> PrefillConfig:
    """As `decode_config`; float32 is exact rather than fast."""
    if dtype == torch.float32:
        return PrefillConfig(rows=32, tile=32, num_stages=1, num_warps=4)
    if head_dim > 128:
        return PrefillConfig(num_stages=2)
    return PrefillConfig()


def paged_attention_triton(
    q: Tensor,
    kv_cache: Tensor,
    meta: PagedBatch,
    scale: float,
    window: int | None,
    plan: DecodePlan | None = None,
    softcap: float | None = None,
    is_settled: bool = False,
) -> Tensor:
    """See `paged_attention.paged_attention`; `plan` is `plan_decode`'s, made here if not given; is_settled: see
    `decode_attention`.

    The last dimension of `q` and `kv_cache` is contiguous. Rows of q that belong to no request give zeros.
    """
    covered = meta.num_decodes + sum(meta.query_lens_host[meta.num_decodes :])
    out = (torch.empty if covered == q.shape[0] else torch.zeros)(q.shape, dtype=q.dtype, device=q.device)
    if meta.num_decodes:
        if plan is None:
            plan = plan_decode(meta.seq_lens[: meta.num_decodes], q, kv_cache, window)
        decode_attention(q, kv_cache, out, meta.seq_lens, meta.block_table, plan, scale, softcap, is_settled)
    if meta.num_reqs > meta.num_decodes:
        prefill_attention(
            q, kv_cache, out, meta.query_start_loc, meta.seq_lens, meta.block_table, meta.num_decodes, scale, window,
            softcap,
        )  # fmt: skip
    return out


# --- decode ------------------------------------------------------------


@triton.jit(do_not_specialize=["num_reqs", "num_programs"])
def _plan_kernel(
    seq_lens_ptr,
    tile_start_ptr,
    first_request_ptr,
    num_reqs,
    num_programs,
    NUM_KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    BLOCK_PROGRAMS: tl.constexpr,
):
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
    num_programs = config.occupancy * _num_multiprocessors(q.device)

    def room(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    plan = DecodePlan(
        tile_start=room(torch.int32, num_reqs + 1),
        first_request=room(torch.int32, num_programs),
        arrived=room(torch.int32, num_reqs * num_kv_heads).zero_(),
        partial_out=room(torch.float32, num_programs, 2, group, head_dim),
        partial_stats=room(torch.float32, num_programs, 2, 2, group),
        tile=config.tile,
        window=window,
    )
    _plan_kernel[(triton.cdiv(num_programs, PLAN_PROGRAMS),)](
        seq_lens, plan.tile_start, plan.first_request, num_reqs, num_programs,
        NUM_KV_HEADS=num_kv_heads, WINDOW=window or 0, TILE=config.tile,
        BLOCK_REQS=triton.next_power_of_2(num_reqs), BLOCK_PROGRAMS=PLAN_PROGRAMS, num_warps=8,
    )  # fmt: skip
    return plan


@triton.jit
def _blocks_of_tile(table_ptr, first_token, seq_len, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where the tile at `first_token` lies: one block id if it is inside one block, else one id per token."""
    if BLOCK_SIZE % TILE == 0:
        return tl.load(table_ptr + first_token // BLOCK_SIZE, mask=first_token < seq_len, other=0)
    else:
        token = first_token + tl.arange(0, TILE)
        return tl.load(table_ptr + token // BLOCK_SIZE, mask=token < seq_len, other=0)


@triton.jit
def _offsets_of_tile(
    blocks, first_token, stride_block, stride_token, stride_head, head, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Offset in the cache of each token of the tile."""
    base = blocks.to(tl.int64) * stride_block + head * stride_head
    if BLOCK_SIZE % TILE == 0:
        return base + (first_token % BLOCK_SIZE) * stride_token + tl.arange(0, TILE) * stride_token
    else:
        return base + (first_token + tl.arange(0, TILE)) % BLOCK_SIZE * stride_token


@triton.jit
def _scores(q, k, scale, SOFTCAP: tl.constexpr):
    """q k^T as exponents of 2. With a soft-cap, scale and SOFTCAP are those of `_exponents`."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP > 0.0:
        scores = SOFTCAP - 2.0 * SOFTCAP / (1.0 + tl.exp2(scores))  # tanh(x) = 1 - 2 / (1 + e^(2 x))
    return scores


@triton.jit
def _take_in(top, norm, acc, scores, v):
    """One tile more in the online softmax (Milakov and Gimelshein, 2018): the new running maximum, sum and output."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    decay = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[:, None])
    norm = norm * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_top, norm, acc


def _exponents(scale: float, softcap: float | None) -> tuple[float, float]:
    """(scale, SOFTCAP) for `_scores`, so that 2 to its results is e to the scores."""
    if softcap is None:
        return scale * LOG2_E, 0.0
    return 2 * scale / softcap * LOG2_E, softcap * LOG2_E


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
        _prefetch_first_tile(
            position, end, req, cache_ptr, seq_lens_ptr, table_ptr, tile_start_ptr, table_stride,
            cache_stride_kv, cache_stride_block, cache_stride_head, cache_stride_token,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW,
        )  # fmt: skip
        tl.extra.cuda.gdc_wait()

    row = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    row_mask = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    while position < end:
        item_tile_start = tl.load(tile_start_ptr + req)
        tiles = tl.load(tile_start_ptr + req + 1) - item_tile_start
        seq_len = tl.load(seq_lens_ptr + req)
        lowest = tl.maximum(seq_len - WINDOW, 0) if WINDOW else 0
        first_tile = lowest // TILE
        in_request = (position - item_tile_start.to(tl.int64) * NUM_KV_HEADS).to(tl.int32)
        head = in_request // tiles
        tile = in_request % tiles
        stop = tl.minimum(tile + (end - position), tiles).to(tl.int32)
        row_table_ptr = table_ptr + req.to(tl.int64) * table_stride
        q_offset = req.to(tl.int64) * q_stride_token + (head * GROUP + row) * q_stride_head
        q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=row_mask, other=0.0)

        top = tl.full([BLOCK_GROUP], LOWEST, tl.float32)
        norm = tl.zeros([BLOCK_GROUP], tl.float32)
        acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
        blocks = _blocks_of_tile(row_table_ptr, (first_tile + tile) * TILE, seq_len, TILE, BLOCK_SIZE)
        for t in range(first_tile + tile, first_tile + stop):
            token = t * TILE + tl.arange(0, TILE)
            visible = token < seq_len
            if WINDOW:
                visible = visible & (token >= lowest)
            offset = _offsets_of_tile(
                blocks, t * TILE, cache_stride_block, cache_stride_token, cache_stride_head, head, TILE, BLOCK_SIZE
            )
            tile_ptr = cache_ptr + offset[:, None] + dim[None, :]
            if BLOCK_DIM == HEAD_DIM:
                k = tl.load(tile_ptr)
                v = tl.load(tile_ptr + cache_stride_kv, mask=visible[:, None], other=0.0)
            else:
                k = tl.load(tile_ptr, mask=(dim < HEAD_DIM)[None, :], other=0.0)
                v = tl.load(tile_ptr + cache_stride_kv, mask=visible[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
            # Read one tile ahead, so that the loads above never wait for it and can be pipelined.
            blocks = _blocks_of_tile(row_table_ptr, (t + 1) * TILE, seq_len, TILE, BLOCK_SIZE)
            scores = _scores(q, k, scale, SOFTCAP)
            scores = tl.where(visible[None, :], scores, float("-inf"))
            top, norm, acc = _take_in(top, norm, acc, scores, v)

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
        req += (in_request + stop - tile == tiles * NUM_KV_HEADS).to(tl.int32)


@triton.jit
def _prefetch_first_tile(
    position, end, req, cache_ptr, seq_lens_ptr, table_ptr, tile_start_ptr, table_stride,
    cache_stride_kv, cache_stride_block, cache_stride_head, cache_stride_token,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Brings keys and values of the range's first tile into L2, also while the newest of them are still written: L2 is
    what all multiprocessors see."""
    LINE_ELEMENTS: tl.constexpr = LINE * 8 // cache_ptr.dtype.element_ty.primitive_bitwidth
    if position < end:
        first = tl.load(tile_start_ptr + req)
        tiles = tl.load(tile_start_ptr + req + 1) - first
        seq_len = tl.load(seq_lens_ptr + req)
        lowest = tl.maximum(seq_len - WINDOW, 0) if WINDOW else 0
        in_request = (position - first.to(tl.int64) * NUM_KV_HEADS).to(tl.int32)
        token = (lowest // TILE + in_request % tiles) * TILE
        blocks = _blocks_of_tile(table_ptr + req.to(tl.int64) * table_stride, token, seq_len, TILE, BLOCK_SIZE)
        offset = _offsets_of_tile(
            blocks, token, cache_stride_block, cache_stride_token, cache_stride_head, in_request // tiles,
            TILE, BLOCK_SIZE,
        )  # fmt: skip
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
    config: DecodeConfig | None = None,
) -> None:
    """Writes rows 0 .. n - 1 of the contiguous `out` for the n requests planned; query i belongs to request i.

    is_settled: plan, lengths and blocks were written before the kernel ahead of this one started, so that this one may
    read them before it waits for that one.
    """
    config = config or decode_config(q.shape[2], q.dtype, plan.tile_start.shape[0] - 1)
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    group = q.shape[1] // num_kv_heads
    block_dim = max(16, triton.next_power_of_2(head_dim))  # tl.dot takes no less
    combine_cols = triton.next_power_of_2(group) * block_dim
    exponent_scale, exponent_cap = _exponents(scale, softcap)
    pdl = has_dependent_launch(q.device)
    _decode_kernel[(plan.first_request.shape[0],)](
        q, kv_cache, out, seq_lens, block_table, plan.tile_start, plan.first_request, plan.arrived,
        plan.partial_out, plan.partial_stats, plan.tile_start.shape[0] - 1, block_table.stride(0),
        q.stride(0), q.stride(1), *kv_cache.stride()[:4], exponent_scale,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, BLOCK_GROUP=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim, BLOCK_DIM=block_dim, BLOCK_SIZE=block_size, TILE=plan.tile, WINDOW=plan.window or 0,
        SOFTCAP=exponent_cap, COMBINE_COLS=combine_cols, COMBINE_ROWS=max(1, COMBINE_ELEMENTS // combine_cols),
        PREFETCH=config.prefetch and is_settled and pdl and block_dim * q.element_size() >= LINE, PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=pdl,
        maxnreg=min(REGISTERS // (config.occupancy * config.num_warps * 32) // 8 * 8, 248),
    )  # fmt: skip


# --- prefill ------------------------------------------------------------


@triton.jit
def _attend(
    top,
    norm,
    acc,
    q,
    cache_ptr,
    table_ptr,
    query_position,
    begin,
    end,
    seq_len,
    head,
    cache_stride_kv,
    cache_stride_block,
    cache_stride_head,
    cache_stride_token,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The online softmax over tiles begin .. end of keys."""
    dim = tl.arange(0, BLOCK_DIM)
    dim_mask = (dim < HEAD_DIM)[None, :]
    blocks = _blocks_of_tile(table_ptr, begin * TILE, seq_len, TILE, BLOCK_SIZE)
    for t in range(begin, end):
        token = t * TILE + tl.arange(0, TILE)
        offset = _offsets_of_tile(
            blocks, t * TILE, cache_stride_block, cache_stride_token, cache_stride_head, head, TILE, BLOCK_SIZE
        )
        tile_ptr = cache_ptr + offset[:, None] + dim[None, :]
        if BLOCK_DIM == HEAD_DIM:
            k = tl.load(tile_ptr)
        else:
            k = tl.load(tile_ptr, mask=dim_mask, other=0.0)
        if MASKED:
            v = tl.load(tile_ptr + cache_stride_kv, mask=(token < seq_len)[:, None] & dim_mask, other=0.0)
        elif BLOCK_DIM == HEAD_DIM:
            v = tl.load(tile_ptr + cache_stride_kv)
        else:
            v = tl.load(tile_ptr + cache_stride_kv, mask=dim_mask, other=0.0)
        blocks = _blocks_of_tile(table_ptr, (t + 1) * TILE, seq_len, TILE, BLOCK_SIZE)
        scores = _scores(q, k, scale, SOFTCAP)
        if MASKED:
            distance = query_position[:, None] - token[None, :]
            visible = distance >= 0
            if WINDOW:
                visible = visible & (distance < WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        top, norm, acc = _take_in(top, norm, acc, scores, v)
    return top, norm, acc


@triton.jit(do_not_specialize=["first_req", "num_reqs", "table_stride"])
def _prefill_kernel(
    q_ptr,
    cache_ptr,
    out_ptr,
    query_start_ptr,
    seq_lens_ptr,
    table_ptr,
    first_req,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PDL: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP
    if PDL:
        tl.extra.cuda.gdc_wait()
    # The last tokens of a request see the most keys: they start first.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    # Program numbers are dealt so that request i begins at (its first token // TOKENS) + i: never too few of them.
    base = tl.load(query_start_ptr + first_req)
    begun = 0
    for chunk in range(first_req, num_reqs, 128):
        req = chunk + tl.arange(0, 128)
        start = tl.load(query_start_ptr + req, mask=req < num_reqs, other=0) - base
        begun += tl.sum(((start // TOKENS + req - first_req <= program) & (req < num_reqs)).to(tl.int32), axis=0)
    req = first_req + begun - 1
    query_start = tl.load(query_start_ptr + req)
    query_len = tl.load(query_start_ptr + req + 1) - query_start
    first_query = (program - ((query_start - base) // TOKENS + req - first_req)) * TOKENS
    if first_query >= query_len:
        return

    seq_len = tl.load(seq_lens_ptr + req)
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    query = first_query + row // GROUP
    query_head = head * GROUP + row % GROUP
    row_mask = ((row < TOKENS * GROUP) & (query < query_len))[:, None] & (dim < HEAD_DIM)[None, :]
    token = (query_start + query).to(tl.int64)
    q_offset = token * q_stride_token + query_head * q_stride_head
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=row_mask, other=0.0)
    first_position = seq_len - query_len + first_query
    query_position = first_position + row // GROUP
    end = tl.cdiv(tl.minimum(first_position + TOKENS, seq_len), TILE)
    table_ptr += req.to(tl.int64) * table_stride

    top = tl.full([ROWS], LOWEST, tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    masked_from = 0
    if WINDOW:
        masked_from = tl.maximum(first_position - WINDOW + 1, 0) // TILE
    else:
        masked_from = tl.maximum(first_position + 1, 0) // TILE  # every query of the program sees the tiles before
        top, norm, acc = _attend(
            top, norm, acc, q, cache_ptr, table_ptr, query_position, 0, masked_from, seq_len, head,
            cache_stride_kv, cache_stride_block, cache_stride_head, cache_stride_token, scale,
            HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, False,
        )  # fmt: skip
    top, norm, acc = _attend(
        top, norm, acc, q, cache_ptr, table_ptr, query_position, masked_from, end, seq_len, head,
        cache_stride_kv, cache_stride_block, cache_stride_head, cache_stride_token, scale,
        HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, True,
    )  # fmt: skip
    result = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    out_offset = (token * (NUM_KV_HEADS * GROUP) + query_head) * HEAD_DIM
    tl.store(out_ptr + out_offset[:, None] + dim[None, :], result.to(out_ptr.dtype.element_ty), mask=row_mask)


def prefill_attention(
    q: Tensor,
    kv_cache: Tensor,
    out: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    first_req: int,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    config: PrefillConfig | None = None,
) -> None:
    """Writes the rows of requests first_req .. n - 1 in the contiguous `out`; the requests before have one row each."""
    config = config or prefill_config(q.shape[2], q.dtype)
    num_reqs = seq_lens.shape[0]
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    group = q.shape[1] // num_kv_heads
    rows = max(config.rows, triton.next_power_of_2(group))
    num_tiles = (q.shape[0] - first_req) // (rows // group) + num_reqs - first_req
    exponent_scale, exponent_cap = _exponents(scale, softcap)
    pdl = has_dependent_launch(q.device)
    _prefill_kernel[(num_tiles, num_kv_heads)](
        q, kv_cache, out, query_start_loc, seq_lens, block_table, first_req, num_reqs, block_table.stride(0),
        q.stride(0), q.stride(1), *kv_cache.stride()[:4], exponent_scale,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size, ROWS=rows, TILE=config.tile, WINDOW=window or 0, SOFTCAP=exponent_cap, PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=pdl,
    )  # fmt: skip


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count
