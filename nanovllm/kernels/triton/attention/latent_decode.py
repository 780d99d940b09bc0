"""Decode attention over latents in Triton: the stream-K cut of `decode.py`, with all heads in a program.

Owns the kernel; cut and merging are `decode_plan.py`'s and `decode.py`'s. Invariant: as in `paged_attention.py`.

A token's row of the cache is read once for all heads, and used twice. With 16 heads and 576 numbers, that is 60
operations for each byte: still less than a GPU could do meanwhile, so what counts is bytes on their way. More heads
than `MAX_GROUP` are several programs, which find the row in the cache that all multiprocessors share.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.decode import COMBINE_ELEMENTS, store_output_or_partial
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
from nanovllm.kernels.triton.common.sizes import next_power_of_2


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
    return DecodeConfig(tile=32, num_stages=3, num_warps=8, occupancy=1)


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
    out_ptr,
    seq_lens_ptr,
    table_ptr,
    num_tiles_ptr,
    starts_ptr,
    semaphores_ptr,
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
            tl.zeros([BLOCK_GROUP, BLOCK_RANK], tl.float32), q, q_rope, cache_ptr, row_table_ptr, blocks, seq_len - 1,
            tile, stop, seq_len // TILE, seq_len, STRIDE_BLOCK, STRIDE_TOKEN, scale,
            RANK, BLOCK_RANK, ROPE, BLOCK_ROPE, BLOCK_SIZE, TILE, True, NUM_STAGES,
        )  # fmt: skip
        store_output_or_partial(
            top, norm, acc, out_ptr, semaphores_ptr, partial_out_ptr, partial_stats_ptr,
            req, group, tile, stop, tiles, position, length,
            NUM_GROUPS, GROUP, BLOCK_GROUP, RANK, BLOCK_RANK, COMBINE_COLS, COMBINE_ROWS,
        )  # fmt: skip
        position += stop - tile
        req, in_request, seq_len = next_item(
            req, in_request + stop - tile, seq_len, tiles, seq_lens_ptr, num_reqs, NUM_GROUPS
        )
        if BLOCK_SIZE % TILE == 0:
            block = block_at(
                table_ptr, table_stride, req, in_request, seq_len, 0, position < end, TILE, BLOCK_SIZE, 0
            )  # fmt: skip


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
    cut, config, data, block_table = plan.cut, plan.cut.config, cache.data, meta.block_table
    launch(
        _latent_decode_kernel, (cut.starts.shape[0],), q.device,
        q, data, out, meta.seq_lens, block_table, cut.num_tiles, cut.starts,
        cut.semaphores, cut.partial_out, cut.partial_stats, cut.num_reqs, block_table.stride(0),
        q.stride(0), q.stride(1), data.stride(1), data.stride(3),
        **_decode_arguments(shape, cache.block_size, plan.num_groups), TILE=config.tile,
        EARLY=is_settled and has_dependent_launch(q.device),
        **launch_options(config.num_stages, config.num_warps, config.occupancy),
    )  # fmt: skip


@cache
def _decode_arguments(shape: AttentionShape, block_size: int, num_groups: int) -> dict[str, int | float]:
    arguments = latent_arguments(shape, block_size, num_groups)
    group = next_power_of_2(shape.num_heads // num_groups)
    combine_cols = group * int(arguments["BLOCK_RANK"])
    return {
        **arguments,
        "BLOCK_GROUP": max(16, group),
        "COMBINE_COLS": combine_cols,
        "COMBINE_ROWS": max(1, COMBINE_ELEMENTS // combine_cols),
    }
