"""Prefill attention over latents in Triton: rows of a program are tokens and heads, its keys are latents.

Owns the kernel; the order of the tiles of queries is `prefill.py`'s. Invariant: as in `paged_attention.py`.

Queries come absorbed, as in decode: one kernel reads the cache as it is, whatever of a context was computed before, and
needs no room that grows with the context. It is for prompts that begin in the prefix cache or go on after a chunk, for
captured steps, and for those beside decodes; whole prompts are `latent_whole.py`'s.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.cells import data_of, pairs_of
from nanovllm.kernels.triton.attention.latent_tiles import attend_latents, in_groups, latent_arguments, load_query
from nanovllm.kernels.triton.attention.prefill import PrefillConfig, PrefillPlan, plan_prefill, rows_of_program
from nanovllm.kernels.triton.attention.tiles import LOWEST, blocks_of_tile, has_tile_loads, launch_options
from nanovllm.kernels.triton.common.device_limits import has_large_shared_memory
from nanovllm.kernels.triton.common.launch import launch


@dataclass(frozen=True)
class LatentPrefillPlan:
    """order: of `plan_prefill`, for `num_groups` groups of heads in the place of KV heads."""

    order: PrefillPlan
    num_groups: int


def latent_prefill_config(dtype: torch.dtype, device: torch.device) -> PrefillConfig:
    if dtype == torch.float32:
        return PrefillConfig(rows=16, tile=16, num_stages=1, occupancy=1)
    if not has_large_shared_memory(device):
        return PrefillConfig(rows=32, tile=16, num_stages=1, num_warps=8, occupancy=1)
    tile = 64 if has_tile_loads(device) else 32  # as much shared memory as GPUs from 9.0 on have, measured on an H200
    return PrefillConfig(rows=64, tile=tile, num_stages=2, num_warps=8, occupancy=1)


def plan_latent_prefill(
    meta: AttentionMetadata, q: Tensor, cache: LayerCache, first_req: int, config: PrefillConfig | None = None
) -> LatentPrefillPlan:
    """Plans requests first_req .. n - 1 of a step. Of q and the cache only shapes, dtype and device count."""
    grouped = in_groups(cache, q.shape[1])
    config = config or latent_prefill_config(q.dtype, q.device)
    order = plan_prefill(meta.query_start_loc, meta.seq_lens, first_req, q, grouped, config)
    return LatentPrefillPlan(order, grouped.data.shape[2])


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["query_start_ptr"])
def _latent_prefill_kernel(
    q_ptr,
    cache_ptr,
    pairs_ptr,
    out_ptr,
    query_start_ptr,
    seq_lens_ptr,
    table_ptr,
    order_ptr,
    table_stride,
    q_stride_token,
    q_stride_head,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    scale,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    group = tl.program_id(0) % NUM_GROUPS
    place = tl.program_id(0) // NUM_GROUPS
    req = tl.load(order_ptr + place * 2)
    first_query = tl.load(order_ptr + place * 2 + 1)
    if req < 0:
        return

    query_start = tl.load(query_start_ptr + req)
    query_len = tl.load(query_start_ptr + req + 1) - query_start
    seq_len = tl.load(seq_lens_ptr + req)
    row = tl.arange(0, ROWS)
    query = first_query + row // GROUP
    query_head = group * GROUP + row % GROUP
    row_mask = (row < TOKENS * GROUP) & (query < query_len)
    token = (query_start + query).to(tl.int64)
    row_ptr = q_ptr + token * q_stride_token + query_head * q_stride_head
    q, q_rope = load_query(row_ptr, row_mask, RANK, BLOCK_RANK, ROPE, BLOCK_ROPE)
    first_position = seq_len - query_len + first_query
    query_position = (first_position + row // GROUP)[:, None]
    end = tl.cdiv(tl.minimum(first_position + TOKENS, seq_len), TILE)
    table_ptr += req.to(tl.int64) * table_stride

    top = tl.full([ROWS], LOWEST, tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_RANK], tl.float32)
    whole_to = tl.maximum(first_position + 1, 0) // TILE
    ragged_from = tl.maximum(tl.minimum(end, seq_len // TILE), 0)
    blocks = blocks_of_tile(table_ptr, 0, seq_len, TILE, BLOCK_SIZE)
    top, norm, acc = attend_latents(
        top, norm, acc, q, q_rope, cache_ptr, pairs_ptr, table_ptr, blocks, query_position, 0, ragged_from, whole_to,
        seq_len, STRIDE_BLOCK, STRIDE_TOKEN, scale, RANK, BLOCK_RANK, ROPE, BLOCK_ROPE, BLOCK_SIZE, TILE, False,
        NUM_STAGES,
    )  # fmt: skip
    blocks = blocks_of_tile(table_ptr, ragged_from * TILE, seq_len, TILE, BLOCK_SIZE)
    top, norm, acc = attend_latents(
        top, norm, acc, q, q_rope, cache_ptr, pairs_ptr, table_ptr, blocks, query_position, ragged_from, end,
        ragged_from, seq_len, STRIDE_BLOCK, STRIDE_TOKEN, scale, RANK, BLOCK_RANK, ROPE, BLOCK_ROPE, BLOCK_SIZE, TILE,
        True, 1,
    )  # fmt: skip
    result = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    rank = tl.arange(0, BLOCK_RANK)[None, :]
    out_offset = (token * (NUM_GROUPS * GROUP) + query_head) * RANK
    mask = row_mask[:, None] & (rank < RANK)
    tl.store(out_ptr + out_offset[:, None] + rank, result.to(out_ptr.dtype.element_ty), mask=mask)


def latent_prefill(
    q: Tensor, cache: LayerCache, out: Tensor, meta: AttentionMetadata, plan: LatentPrefillPlan, shape: AttentionShape
) -> None:
    """Writes the rows of the requests planned in the contiguous `out`."""
    order, config, data, block_table = plan.order.order, plan.order.config, cache.data, meta.block_table
    launch(
        _latent_prefill_kernel, (order.shape[0] * plan.num_groups,), q.device,
        q, data_of(cache), pairs_of(cache), out, meta.query_start_loc, meta.seq_lens, block_table, order,
        block_table.stride(0), q.stride(0), q.stride(1), data.stride(1), data.stride(3),
        **latent_arguments(shape, cache.block_size, plan.num_groups), TILE=config.tile,
        ROWS=rows_of_program(config, shape.num_heads // plan.num_groups),
        **launch_options(config.num_stages, config.num_warps, config.occupancy),
    )  # fmt: skip
