"""Cascade attention in Triton: many requests' queries against the stretch of keys that they share.

Owns the kernel that works off the items of `kernels/cascade.py`; `decode.py` goes on from what they leave. Invariant:
how many items there are is read on the device, and programs take them in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionShape, LayerCache
from nanovllm.kernels.cascade import ITEM_FIELDS, ROWS, TILE, CascadeInputs
from nanovllm.kernels.triton.attention.cells import data_of, from_halves, in_halves, pairs_of
from nanovllm.kernels.triton.attention.tiles import (
    LOWEST,
    attend_tiles,
    blocks_of_tile,
    fence_tile_loads,
    launch_options,
    layer_arguments,
    num_multiprocessors,
    tile_descriptor,
)
from nanovllm.kernels.triton.common.device_limits import has_large_shared_memory
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import next_power_of_2

FIELDS = tl.constexpr(ITEM_FIELDS)


@dataclass(frozen=True)
class CascadeConfig:
    """Pipeline depth, warps, programs per multiprocessor."""

    num_stages: int = 3
    num_warps: int = 4
    occupancy: int = 2
    tile_loads: bool = True


@dataclass(frozen=True)
class CascadeResults:
    """What the items of a layer leave: normalized outputs [parts, n, num_heads, head_dim] and the logarithms to base 2
    of the sums of their weights [parts, n, num_heads], float32."""

    out: Tensor
    log_sum: Tensor


def cascade_config(cache: LayerCache) -> CascadeConfig:
    """Measured on an H100 with 8 to 512 requests and prefixes of 1,024 to 32,768 tokens. float32 and wide heads: what
    fits."""
    if cache.data.dtype == torch.float32 or cache.data.shape[4] > 128:
        return CascadeConfig(num_stages=1, occupancy=1, tile_loads=False)
    if cache.scales is not None and not has_large_shared_memory(cache.data.device):  # queries may be float32
        return CascadeConfig(num_stages=1, occupancy=1)
    return CascadeConfig()


def num_programs(cache: LayerCache) -> int:
    """That run at the same time."""
    return cascade_config(cache).occupancy * num_multiprocessors(cache.data.device)


def room_for_results(inputs: CascadeInputs, num_heads: int, head_dim: int) -> CascadeResults:
    shape, device = (inputs.max_parts, inputs.shared_lens.shape[0], num_heads), inputs.items.device
    return CascadeResults(
        out=torch.empty((*shape, head_dim), dtype=torch.float32, device=device),
        log_sum=torch.empty(shape, dtype=torch.float32, device=device),
    )


@triton.jit(do_not_specialize=["num_reqs", "table_stride"])
def _cascade_kernel(
    q_ptr,
    cache_ptr,
    pairs_ptr,
    cache_desc,
    out_ptr,
    log_sum_ptr,
    num_items_ptr,
    items_ptr,
    table_ptr,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
        if cache_desc is not None:
            fence_tile_loads()
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    total = tl.load(num_items_ptr) * NUM_KV_HEADS
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        # The heads of one item follow each other.
        head = work % NUM_KV_HEADS
        item_ptr = items_ptr + work // NUM_KV_HEADS * FIELDS
        first, count = tl.load(item_ptr), tl.load(item_ptr + 1)
        begin, end, part = tl.load(item_ptr + 2), tl.load(item_ptr + 3), tl.load(item_ptr + 4)
        req = (first + row // GROUP).to(tl.int64)
        query_head = head * GROUP + row % GROUP
        is_row = row < count * GROUP
        row_mask = is_row[:, None] & (dim < HEAD_DIM)[None, :]
        q_offset = req * q_stride_token + query_head * q_stride_head
        q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=row_mask, other=0.0)
        row_table_ptr = table_ptr + first.to(tl.int64) * table_stride
        top = tl.full([ROWS], LOWEST, tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
        blocks = blocks_of_tile(row_table_ptr, begin, end, TILE, BLOCK_SIZE)
        top, norm, acc = attend_tiles(
            top, norm, in_halves(acc, pairs_ptr), in_halves(q, pairs_ptr), cache_ptr, pairs_ptr, cache_desc,
            row_table_ptr, blocks, end,
            begin // TILE, end // TILE, 0, end // TILE, end, head,
            cache_stride_kv, STRIDE_BLOCK, STRIDE_HEAD, STRIDE_TOKEN, scale,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_DIM, BLOCK_SIZE, TILE, 0, SOFTCAP, False, NUM_STAGES,
        )  # fmt: skip
        acc = from_halves(acc, pairs_ptr)
        place = (part.to(tl.int64) * num_reqs + req) * (NUM_KV_HEADS * GROUP) + query_head
        tl.store(out_ptr + place[:, None] * HEAD_DIM + dim[None, :], acc / norm[:, None], mask=row_mask)
        tl.store(log_sum_ptr + place, top + tl.log2(norm), mask=is_row)


def cascade_attention(
    q: Tensor,
    cache: LayerCache,
    block_table: Tensor,
    inputs: CascadeInputs,
    results: CascadeResults,
    shape: AttentionShape,
) -> None:
    """Works off the items: queries q [.., num_heads, head_dim] of the n decodes over their shared prefixes."""
    config, data = cascade_config(cache), data_of(cache)
    launch(
        _cascade_kernel, (num_programs(cache),), q.device,
        q, data, pairs_of(cache), tile_descriptor(data, TILE) if config.tile_loads else None, results.out,
        results.log_sum, inputs.num_items, inputs.items, block_table, inputs.shared_lens.shape[0],
        block_table.stride(0), q.stride(0), q.stride(1), *data.stride()[:4],
        **layer_arguments(shape, cache.block_size), TILE=TILE,
        ROWS=max(ROWS, next_power_of_2(shape.num_heads // shape.num_kv_heads)),
        **launch_options(config.num_stages, config.num_warps, config.occupancy),
    )  # fmt: skip


@triton.jit
def take_in_parts(
    top, norm, acc, out_ptr, log_sum_ptr, num_parts, num_reqs, req, head,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The online softmax of a request's queries under one KV head, and all that items left for it taken in."""
    row = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    row_mask = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    for part in range(num_parts):
        place = ((part * num_reqs + req) * NUM_KV_HEADS + head) * GROUP + row
        log_sum = tl.load(log_sum_ptr + place, mask=row < GROUP, other=LOWEST)
        out = tl.load(out_ptr + place[:, None] * HEAD_DIM + dim[None, :], mask=row_mask, other=0.0)
        new_top = tl.maximum(top, log_sum)
        decay, weight = tl.exp2(top - new_top), tl.exp2(log_sum - new_top)
        norm = norm * decay + weight
        acc = acc * decay[:, None] + out * weight[:, None]
        top = new_top
    return top, norm, acc
