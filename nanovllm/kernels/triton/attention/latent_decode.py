"""Decode attention over latents in Triton: the stream-K cut of `decode.py`, with all heads in a program.

Owns the kernel, and one that merges what it leaves; the cut is `decode_plan.py`'s. Invariant: as in
`paged_attention.py`.

A token's row of the cache is read once for all heads, and used twice. With 16 heads and 576 numbers, that is 60
operations for each byte: still less than a GPU could do meanwhile, so what counts is bytes on their way. More heads
than `MAX_GROUP` are several programs, which find the row in the cache that all multiprocessors share.

What a program leaves of an item is 16 heads of 512 numbers, too much for one program to add up behind a hundred others:
it would take longer than attention. So merging is a kernel of its own, with programs for each head, or parts of one.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.cells import data_of, pairs_of
from nanovllm.kernels.triton.attention.decode_plan import (
    DecodeConfig,
    DecodePlan,
    block_at,
    next_item,
    plan_decode,
    range_of_program,
    tiles_of,
)
from nanovllm.kernels.triton.attention.latent_tiles import attend_latents, in_groups, latent_arguments, load_query
from nanovllm.kernels.triton.attention.tiles import LOWEST, blocks_of_tile, launch_options
from nanovllm.kernels.triton.common.device_limits import has_large_shared_memory
from nanovllm.kernels.triton.common.launch import has_dependent_launch, launch
from nanovllm.kernels.triton.common.sizes import cdiv, coarse_size, next_power_of_2

FEW_REQUESTS = 4  # for which a head is merged by several programs
AT_ONCE = 8  # partials in flight


@dataclass(frozen=True)
class LatentDecodePlan:
    """cut: of `plan_decode`, for `num_groups` groups of heads in the place of KV heads."""

    cut: DecodePlan
    num_groups: int


def latent_decode_config(dtype: torch.dtype, device: torch.device) -> DecodeConfig:
    if dtype == torch.float32:
        return DecodeConfig(tile=16, num_stages=1, occupancy=1)
    if not has_large_shared_memory(device):
        return DecodeConfig(tile=16, num_stages=2, num_warps=8, occupancy=1)
    return DecodeConfig(tile=64, num_stages=2, num_warps=8, occupancy=1)


def plan_latent_decode(
    meta: AttentionMetadata, out: Tensor, cache: LayerCache, config: DecodeConfig | None = None
) -> LatentDecodePlan:
    """out [num_tokens, num_heads, rank]; of it and the cache only shapes, dtype and device count."""
    grouped = in_groups(cache, out.shape[1])
    config = config or latent_decode_config(out.dtype, out.device)
    cut = plan_decode(meta.seq_lens[: meta.num_decodes], meta.block_table, out, grouped, None, config)
    return LatentDecodePlan(cut, grouped.data.shape[2])


@triton.jit(do_not_specialize=["num_reqs", "table_stride"])
def _latent_decode_kernel(
    q_ptr,
    cache_ptr,
    pairs_ptr,
    out_ptr,
    seq_lens_ptr,
    table_ptr,
    num_tiles_ptr,
    starts_ptr,
    partial_out_ptr,
    partial_stats_ptr,
    num_reqs,
    table_stride,
    q_stride_token,
    q_stride_head,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    scale,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL and not EARLY:
        tl.extra.cuda.gdc_wait()
    _length, position, end, req, in_request, seq_len, block = range_of_program(starts_ptr, num_tiles_ptr)
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.arange(0, BLOCK_GROUP)
    while position < end:
        _lowest, _first_tile, tiles = tiles_of(seq_len, 0, TILE, 0)
        group, tile = in_request // tiles, in_request % tiles
        stop = tl.minimum(tile + (end - position), tiles)
        row_table_ptr = table_ptr + req.to(tl.int64) * table_stride
        if BLOCK_SIZE % TILE == 0:
            blocks = block
        else:
            blocks = blocks_of_tile(row_table_ptr, tile * TILE, seq_len, TILE, BLOCK_SIZE)
        row_ptr = q_ptr + req.to(tl.int64) * q_stride_token + (group * GROUP + row) * q_stride_head
        q, q_rope = load_query(row_ptr, row < GROUP, RANK, BLOCK_RANK, ROPE, BLOCK_ROPE)
        top, norm, acc = attend_latents(
            tl.full([BLOCK_GROUP], LOWEST, tl.float32), tl.zeros([BLOCK_GROUP], tl.float32),
            tl.zeros([BLOCK_GROUP, BLOCK_RANK], tl.float32), q, q_rope, cache_ptr, pairs_ptr, row_table_ptr, blocks,
            seq_len - 1, tile, stop, seq_len // TILE, seq_len, STRIDE_BLOCK, STRIDE_TOKEN, scale,
            RANK, BLOCK_RANK, ROPE, BLOCK_ROPE, BLOCK_SIZE, TILE, True, NUM_STAGES,
        )  # fmt: skip
        rank = tl.arange(0, BLOCK_RANK)[None, :]
        place, is_number = row[:, None] * RANK + rank, (row < GROUP)[:, None] & (rank < RANK)
        if stop - tile == tiles:
            result = (acc / tl.where(norm > 0, norm, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + (req.to(tl.int64) * NUM_GROUPS + group) * GROUP * RANK + place, result, mask=is_number)
        else:
            # A range holds the end of an item in slot 0 (or its middle), the beginning of one in slot 1.
            slot = tl.program_id(0) * 2 + (tile == 0).to(tl.int32)
            tl.store(partial_out_ptr + slot.to(tl.int64) * GROUP * RANK + place, acc, mask=is_number)
            tl.store(partial_stats_ptr + slot * 2 * GROUP + row, top, mask=row < GROUP)
            tl.store(partial_stats_ptr + slot * 2 * GROUP + GROUP + row, norm, mask=row < GROUP)
        position += stop - tile
        req, in_request, seq_len = next_item(
            req, in_request + stop - tile, seq_len, tiles, seq_lens_ptr, num_reqs, NUM_GROUPS
        )
        if BLOCK_SIZE % TILE == 0:
            block = block_at(
                table_ptr, table_stride, req, in_request, seq_len, 0, position < end, TILE, BLOCK_SIZE, 0
            )  # fmt: skip


@triton.jit
def programs_of_item(
    seq_lens_ptr, num_tiles_ptr, req, group, num_reqs, num_programs,
    NUM_GROUPS: tl.constexpr, TILE: tl.constexpr, BLOCK_REQS: tl.constexpr,
):  # fmt: skip
    """The first and the last program that had tiles of a request, for one group of heads."""
    other = tl.arange(0, BLOCK_REQS)
    _lowest, _first_tile, tiles = tiles_of(tl.load(seq_lens_ptr + other, mask=other < num_reqs, other=0), 0, TILE, 0)
    own = tl.sum(tl.where(other == req, tiles, 0), 0)
    begin = tl.sum(tl.where(other < req, tiles, 0), 0) * NUM_GROUPS + group * own
    length = tl.cdiv(tl.load(num_tiles_ptr), num_programs)
    return begin // length, (begin + own - 1) // length


@triton.jit
def merge_partials(
    partial_out_ptr, partial_stats_ptr, first, last, row, col,
    GROUP: tl.constexpr, RANK: tl.constexpr, COLS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The columns `col` [COLS] of head `row` of a group, from what the programs from first to last left of an item."""
    nth = tl.arange(0, AT_ONCE)
    top = tl.full((), LOWEST, tl.float32)
    norm = tl.zeros((), tl.float32)
    acc = tl.zeros([COLS], tl.float32)
    for start in range(first, last + 1, AT_ONCE):
        program = start + nth
        slot, is_left = program * 2 + (program == first).to(tl.int32), program <= last
        stats_ptr = partial_stats_ptr + slot * 2 * GROUP + row
        tops = tl.load(stats_ptr, mask=is_left, other=LOWEST)
        norms = tl.load(stats_ptr + GROUP, mask=is_left, other=0.0)
        outs_ptr = partial_out_ptr + (slot.to(tl.int64) * GROUP + row)[:, None] * RANK + col[None, :]
        outs = tl.load(outs_ptr, mask=is_left[:, None] & (col < RANK)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        decay, weights = tl.exp2(top - new_top), tl.exp2(tops - new_top)
        norm = norm * decay + tl.sum(norms * weights, 0)
        acc = acc * decay + tl.sum(outs * weights[:, None], 0)
        top = new_top
    return acc / tl.where(norm > 0, norm, 1.0)


@triton.jit(do_not_specialize=["num_reqs", "num_programs"])
def _merge_kernel(
    partial_out_ptr,
    partial_stats_ptr,
    out_ptr,
    seq_lens_ptr,
    num_tiles_ptr,
    num_reqs,
    num_programs,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_REQS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Adds up the partials of one request and head, some columns of them; those of an item in one range are none."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    req, head = tl.program_id(0), tl.program_id(1)
    first, last = programs_of_item(
        seq_lens_ptr, num_tiles_ptr, req, head // GROUP, num_reqs, num_programs, NUM_GROUPS, TILE, BLOCK_REQS
    )
    if first == last:
        return
    col = tl.program_id(2) * COLS + tl.arange(0, COLS)
    result = merge_partials(
        partial_out_ptr, partial_stats_ptr, first, last, head % GROUP, col, GROUP, RANK, COLS, AT_ONCE
    )
    out_ptr += (req.to(tl.int64) * NUM_GROUPS * GROUP + head) * RANK + col
    tl.store(out_ptr, result.to(out_ptr.dtype.element_ty), mask=col < RANK)


def latent_decode(
    q: Tensor,
    cache: LayerCache,
    out: Tensor,
    meta: AttentionMetadata,
    plan: LatentDecodePlan,
    shape: AttentionShape,
    is_settled: bool = False,
) -> None:
    """Writes rows 0 .. n - 1 of the contiguous `out` for the n requests planned; see `decode.decode_attention`."""
    cut = plan.cut
    arguments = decode_apart(q, cache, out, meta, plan, shape, is_settled)
    rank = arguments["RANK"]
    cols = min(arguments["BLOCK_RANK"], 128 if cut.num_reqs <= FEW_REQUESTS else 512)
    launch(
        _merge_kernel, (cut.num_reqs, shape.num_heads, cdiv(rank, cols)), q.device,
        cut.partial_out, cut.partial_stats, out, meta.seq_lens, cut.num_tiles, cut.num_reqs, cut.starts.shape[0],
        NUM_GROUPS=plan.num_groups, GROUP=arguments["GROUP"], RANK=rank, TILE=cut.config.tile, COLS=cols,
        AT_ONCE=AT_ONCE, BLOCK_REQS=coarse_size(cut.num_reqs), num_warps=4,
    )  # fmt: skip


def decode_apart(
    q: Tensor,
    cache: LayerCache,
    out: Tensor,
    meta: AttentionMetadata,
    plan: LatentDecodePlan,
    shape: AttentionShape,
    is_settled: bool,
) -> dict[str, int]:
    """The same without the merge: of an item that several programs had, `out` has nothing yet. Returns the sizes of
    heads."""
    cut, config, data, block_table = plan.cut, plan.cut.config, cache.data, meta.block_table
    num_programs, arguments = cut.starts.shape[0], latent_arguments(shape, cache.block_size, plan.num_groups)
    launch(
        _latent_decode_kernel, (num_programs,), q.device,
        q, data_of(cache), pairs_of(cache), out, meta.seq_lens, block_table, cut.num_tiles, cut.starts,
        cut.partial_out, cut.partial_stats, cut.num_reqs, block_table.stride(0),
        q.stride(0), q.stride(1), data.stride(1), data.stride(3), **arguments,
        BLOCK_GROUP=max(16, next_power_of_2(arguments["GROUP"])), TILE=config.tile,
        EARLY=is_settled and has_dependent_launch(q.device),
        **launch_options(config.num_stages, config.num_warps, config.occupancy),
    )  # fmt: skip
    return arguments
