"""Paged decode attention in Triton (flash-decoding), cut into equal ranges of tiles of keys (stream-K).

Owns the decode kernel for any number of requests, and what a program leaves; `decode_plan.py` makes the cut, and a few
decodes by themselves have a kernel of their own, `fused_decode.py`. Invariant: as in `paged_attention.py`: which
program works on what is found on the device.

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

# Tuples of tiles grow while a kernel is compiled.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.cascade import cascade_attention, take_in_parts
from nanovllm.kernels.triton.attention.cells import data_of, from_halves, in_halves, pairs_of
from nanovllm.kernels.triton.attention.decode_plan import (
    DecodePlan,
    block_at,
    next_item,
    range_of_program,
    shared_len_of,
    tiles_of,
)
from nanovllm.kernels.triton.attention.tiles import (
    LOWEST,
    attend_tiles,
    blocks_of_tile,
    launch_options,
    layer_arguments,
    start_softmax,
)
from nanovllm.kernels.triton.common.launch import has_dependent_launch, launch
from nanovllm.kernels.triton.common.sizes import next_power_of_2

COMBINE_ELEMENTS = 16  # floats of partial outputs that a thread has in flight at a time
WIDE_AHEAD = tl.constexpr(6)  # partials in flight, of heads that are more than 256 wide


@triton.jit(do_not_specialize=["num_reqs", "table_stride"])
def _decode_kernel(
    q_ptr,
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
    shared_lens_ptr,
    num_parts_ptr,
    shared_out_ptr,
    shared_log_sum_ptr,
    num_reqs,
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
    length, position, end, req, in_request, seq_len, block = range_of_program(starts_ptr, num_tiles_ptr)
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    row_mask = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    shared_len = shared_len_of(shared_lens_ptr, req, position < end)
    while position < end:
        lowest, first_tile, tiles = tiles_of(seq_len, shared_len, TILE, WINDOW)
        head, tile = in_request // tiles, in_request % tiles
        stop = tl.minimum(tile + (end - position), tiles)
        row_table_ptr = table_ptr + req.to(tl.int64) * table_stride
        if BLOCK_SIZE % TILE == 0:
            blocks = block
        else:
            blocks = blocks_of_tile(row_table_ptr, (first_tile + tile) * TILE, seq_len, TILE, BLOCK_SIZE)
        q_offset = req.to(tl.int64) * q_stride_token + (head * GROUP + row) * q_stride_head
        q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=row_mask, other=0.0)

        top, norm, acc = start_softmax(sinks_ptr, head * GROUP + row, (row < GROUP) & (tile == 0), BLOCK_DIM)
        if shared_lens_ptr is not None:  # noqa: SIM102  (decided when the kernel is compiled, the second when it runs)
            if tile == 0:
                # Whoever has a request's first tile takes in what its shared prefixes came to.
                num_parts = tl.load(num_parts_ptr + req)
                top, norm, acc = take_in_parts(
                    top, norm, acc, shared_out_ptr, shared_log_sum_ptr, num_parts, num_reqs, req, head,
                    NUM_KV_HEADS, GROUP, BLOCK_GROUP, HEAD_DIM, BLOCK_DIM,
                )  # fmt: skip
        top, norm, acc = attend_tiles(
            top, norm, in_halves(acc, pairs_ptr), in_halves(q, pairs_ptr), cache_ptr, pairs_ptr, None,
            row_table_ptr, blocks, seq_len - 1,
            first_tile + tile, first_tile + stop, tl.cdiv(lowest, TILE), seq_len // TILE, seq_len, head,
            cache_stride_kv, STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN, scale,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, True, NUM_STAGES,
        )  # fmt: skip
        acc = from_halves(acc, pairs_ptr)
        store_output_or_partial(
            top, norm, acc, out_ptr, semaphores_ptr, partial_out_ptr, partial_stats_ptr,
            req, head, tile, stop, tiles, position, length,
            NUM_KV_HEADS, GROUP, BLOCK_GROUP, HEAD_DIM, BLOCK_DIM, COMBINE_COLS, COMBINE_ROWS,
        )  # fmt: skip
        position += stop - tile
        req, in_request, seq_len = next_item(
            req, in_request + stop - tile, seq_len, tiles, seq_lens_ptr, num_reqs, NUM_KV_HEADS
        )
        shared_len = shared_len_of(shared_lens_ptr, req, position < end)
        if BLOCK_SIZE % TILE == 0:
            block = block_at(
                table_ptr, table_stride, req, in_request, seq_len, shared_len, position < end, TILE, BLOCK_SIZE,
                WINDOW,
            )  # fmt: skip


@triton.jit
def store_output_or_partial(
    top, norm, acc, out_ptr, semaphores_ptr, partial_out_ptr, partial_stats_ptr,
    req, head, tile, stop, tiles, position, length,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, COMBINE_COLS: tl.constexpr, COMBINE_ROWS: tl.constexpr,
):  # fmt: skip
    """What a program made of tiles tile .. stop of an item that has `tiles` of them: its output, or a partial.

    position: of `tile` among all tiles, of which a range holds `length`.
    """
    row = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    place = row[:, None] * HEAD_DIM + dim[None, :]
    row_mask = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    out_row_ptr = out_ptr + (req.to(tl.int64) * NUM_KV_HEADS + head) * GROUP * HEAD_DIM
    if stop - tile == tiles:
        result = acc / tl.where(norm > 0, norm, 1.0)[:, None]
        tl.store(out_row_ptr + place, result.to(out_ptr.dtype.element_ty), mask=row_mask)
    else:
        # A range holds the end of an item in slot 0 (or its middle), the beginning of one in slot 1.
        slot = tl.program_id(0) * 2 + (tile == 0).to(tl.int32)
        tl.store(partial_out_ptr + slot.to(tl.int64) * GROUP * HEAD_DIM + place, acc, mask=row_mask)
        tl.store(partial_stats_ptr + slot * 2 * GROUP + row, top, mask=row < GROUP)
        tl.store(partial_stats_ptr + slot * 2 * GROUP + GROUP + row, norm, mask=row < GROUP)
        item_begin = position - tile
        first = item_begin // length
        last = (item_begin + tiles - 1) // length
        tl.debug_barrier()  # every warp's stores come before the one thread's release
        counter_ptr = semaphores_ptr + req * NUM_KV_HEADS + head
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == last - first:
            tl.store(counter_ptr, 0)
            if HEAD_DIM > 256:
                _combine_wide(
                    partial_out_ptr, partial_stats_ptr, out_row_ptr, first, last, GROUP, HEAD_DIM, BLOCK_DIM,
                    COMBINE_COLS // BLOCK_DIM,
                )  # fmt: skip
            else:
                _combine(
                    partial_out_ptr, partial_stats_ptr, out_row_ptr, first, last,
                    GROUP, HEAD_DIM, BLOCK_DIM, COMBINE_COLS, COMBINE_ROWS,
                )  # fmt: skip


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
    """Adds up the partials that programs first .. last left for one item, ROWS of them in flight at a time.

    A thread has one element of the output, and finds maximum and sum of its row by itself, so that no thread waits for
    another.
    """
    col = tl.arange(0, COLS)
    row, dim = col // BLOCK_DIM, col % BLOCK_DIM
    col_mask = (row < GROUP) & (dim < HEAD_DIM)
    # The first partial is in its program's other slot. Other multiprocessors wrote them: .cg reads past the L1 cache.
    stats_ptr = partial_stats_ptr + (first * 2 + 1) * 2 * GROUP + row
    out_offset = (first * 2 + 1).to(tl.int64) * (GROUP * HEAD_DIM) + row * HEAD_DIM + dim
    top = tl.load(stats_ptr, mask=col_mask, other=LOWEST, cache_modifier=".cg")
    norm = tl.load(stats_ptr + GROUP, mask=col_mask, other=0.0, cache_modifier=".cg")
    acc = tl.load(partial_out_ptr + out_offset, mask=col_mask, other=0.0, cache_modifier=".cg")
    for start in range(first + 1, last + 1, ROWS):
        tops, norms, outs = (), (), ()
        for i in tl.static_range(ROWS):
            slot = (start + i) * 2
            mask = (start + i <= last) & col_mask
            stats_ptr = partial_stats_ptr + slot * 2 * GROUP + row
            tops = tops + (tl.load(stats_ptr, mask=mask, other=LOWEST, cache_modifier=".cg"),)
            norms = norms + (tl.load(stats_ptr + GROUP, mask=mask, other=0.0, cache_modifier=".cg"),)
            out_offset = slot.to(tl.int64) * (GROUP * HEAD_DIM) + row * HEAD_DIM + dim
            outs = outs + (tl.load(partial_out_ptr + out_offset, mask=mask, other=0.0, cache_modifier=".cg"),)
        new_top = top
        for i in tl.static_range(ROWS):
            new_top = tl.maximum(new_top, tops[i])
        decay = tl.exp2(top - new_top)
        norm, acc, top = norm * decay, acc * decay, new_top
        for i in tl.static_range(ROWS):
            weight = tl.exp2(tops[i] - top)
            norm += norms[i] * weight
            acc += outs[i] * weight
    result = acc / tl.where(norm > 0, norm, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + dim, result.to(out_ptr.dtype.element_ty), mask=col_mask)


@triton.jit
def _combine_wide(
    partial_out_ptr, partial_stats_ptr, out_ptr, first, last,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`_combine` where a thread has many elements: these share a maximum and a sum, and what is in flight is theirs."""
    SLOT: tl.constexpr = GROUP * HEAD_DIM
    row, dim = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    mask = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    place = row[:, None] * HEAD_DIM + dim[None, :]
    top = tl.full([ROWS], LOWEST, tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for start in range(first, last + 1, WIDE_AHEAD):
        tops, norms, outs = (), (), ()
        new_top = top
        for i in tl.static_range(WIDE_AHEAD):
            slot = (start + i) * 2 + (start + i == first).to(tl.int32)
            is_there = start + i <= last
            stats_ptr = partial_stats_ptr + slot * 2 * GROUP + row
            row_mask = is_there & (row < GROUP)
            tops = tops + (tl.load(stats_ptr, mask=row_mask, other=LOWEST, cache_modifier=".cg"),)
            norms = norms + (tl.load(stats_ptr + GROUP, mask=row_mask, other=0.0, cache_modifier=".cg"),)
            slot_ptr = partial_out_ptr + slot.to(tl.int64) * SLOT
            outs = outs + (tl.load(slot_ptr + place, mask=is_there & mask, other=0.0, cache_modifier=".cg"),)
        for i in tl.static_range(WIDE_AHEAD):
            new_top = tl.maximum(new_top, tops[i])
        decay = tl.exp2(top - new_top)
        norm, acc, top = norm * decay, acc * decay[:, None], new_top
        for i in tl.static_range(WIDE_AHEAD):
            weight = tl.exp2(tops[i] - top)
            norm += norms[i] * weight
            acc += outs[i] * weight[:, None]
    result = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=mask)


def decode_attention(
    q: Tensor,
    cache: LayerCache,
    out: Tensor,
    meta: AttentionMetadata,
    plan: DecodePlan,
    shape: AttentionShape,
    sinks: Tensor | None = None,
    is_settled: bool = False,
) -> None:
    """Writes rows 0 .. n - 1 of the contiguous `out` for the n requests planned; query i belongs to request i.

    sinks: see `kernels.paged_attention`. is_settled: an earlier call of this or of `fused_decode` used the plan, so
    that this one may read it before it waits for the kernel ahead.
    """
    config = plan.config
    data, block_table = data_of(cache), meta.block_table
    shared = None, None, None, None
    if plan.cascade is not None and plan.results is not None:
        cascade_attention(q, cache, block_table, plan.cascade, plan.results, shape)
        shared = plan.cascade.shared_lens, plan.cascade.num_parts, plan.results.out, plan.results.log_sum
    launch(
        _decode_kernel, (plan.starts.shape[0],), q.device,
        q, data, pairs_of(cache), sinks, out, meta.seq_lens, block_table, plan.num_tiles, plan.starts,
        plan.semaphores, plan.partial_out, plan.partial_stats, *shared, plan.num_reqs,
        block_table.stride(0), q.stride(0), q.stride(1), *data.stride()[:4],
        **decode_arguments(shape, cache.block_size, config.num_warps), TILE=config.tile, WINDOW=plan.window or 0,
        EARLY=is_settled and has_dependent_launch(q.device),
        **launch_options(config.num_stages, config.num_warps, config.occupancy),
    )  # fmt: skip


@cache
def decode_arguments(shape: AttentionShape, block_size: int, num_warps: int) -> dict[str, int | float]:
    """`layer_arguments`, and what decode kernels are told beyond them."""
    arguments = layer_arguments(shape, block_size)
    group = next_power_of_2(shape.num_heads // shape.num_kv_heads)
    combine_cols = group * arguments["BLOCK_DIM"]
    return {
        **arguments,
        "BLOCK_GROUP": max(16, group),
        "COMBINE_COLS": combine_cols,
        "COMBINE_ROWS": max(1, COMBINE_ELEMENTS * 32 * num_warps // combine_cols),
    }
