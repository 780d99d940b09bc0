"""Work split of decode attention (stream-K): equal ranges of tiles of keys, one for each program.

Owns the cut, found on the device; `decode.py` explains it. Invariant: every item is in one range or in
several that follow each other, and which they are depends on the lengths alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import LayerCache
from nanovllm.kernels.cascade import CascadeInputs
from nanovllm.kernels.triton.attention.cascade import CascadeResults, room_for_results
from nanovllm.kernels.triton.attention.tiles import num_multiprocessors
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, coarse_size

PLAN_PROGRAMS = 32  # ranges that one program of the planning kernel finds
FEW_REQUESTS = 16
FIELDS = tl.constexpr(4)  # of a range: see DecodePlan.starts


@dataclass(frozen=True)
class DecodeConfig:
    """Shape of a decode kernel: keys per tile, pipeline depth, warps, programs per multiprocessor."""

    tile: int = 64
    num_stages: int = 2
    num_warps: int = 4
    occupancy: int = 4


@dataclass(frozen=True)
class DecodePlan:
    """The cut of one step, and room for partial results; serves every layer in turn.

    num_tiles [1]: of all items. starts [programs, 4]: where each range begins, as a request; a tile among those of the
    request, one KV head after the other; the length of its context; and that tile's `block_at`. All of it int32, and
    all tiles together are fewer than 2**31.
    semaphores [n * num_kv_heads]: partials left so far, 0 between calls.
    partial_out [programs, 2, group, head_dim], partial_stats [programs, 2, 2, group] (maximum, sum): float32.
    cascade: prefixes that some of the requests share; the ranges then cover what lies behind them. results: room for
    what comes of them.
    """

    num_tiles: Tensor
    starts: Tensor
    semaphores: Tensor
    partial_out: Tensor
    partial_stats: Tensor
    num_reqs: int
    window: int | None
    config: DecodeConfig
    cascade: CascadeInputs | None = None
    results: CascadeResults | None = None


def decode_config(head_dim: int, dtype: torch.dtype, num_reqs: int, is_coded: bool = False) -> DecodeConfig:
    """Many requests: as many bytes on their way as can be. Few: no program should wait long for anything.

    Measured on an H200 and an H100 with contexts of 384 to 3,800 tokens. Wide heads and wide types take smaller tiles.
    """
    if head_dim > 256:
        return DecodeConfig(tile=16, num_stages=1 if dtype == torch.float32 else 2, num_warps=8, occupancy=1)
    if dtype == torch.float32:
        return DecodeConfig(tile=32, num_stages=2, occupancy=1)
    tile = 32 if head_dim > 128 else 64
    if is_coded:  # half the bytes a tile, so one more is on its way
        return DecodeConfig(tile, num_stages=3, occupancy=3 if num_reqs <= FEW_REQUESTS else 4)
    if num_reqs <= FEW_REQUESTS:
        return DecodeConfig(tile, num_warps=8, occupancy=2)
    return DecodeConfig(tile)


@triton.jit
def tiles_of(seq_len, shared_len, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Of a context: the first token in the window, the first tile with such tokens, and the number of such tiles.

    shared_len: leading tokens that a cascade covers; 0 with a window.
    """
    lowest = tl.maximum(seq_len - WINDOW, 0) if WINDOW else seq_len * 0 + shared_len
    first_tile = lowest // TILE
    # Padding, too, needs a program that writes its zeros.
    return lowest, first_tile, tl.maximum(tl.cdiv(seq_len, TILE) - first_tile, 1)


@triton.jit
def shared_len_of(shared_lens_ptr, req, mask):
    """Leading tokens of a request that a cascade covers."""
    if shared_lens_ptr is None:
        return req * 0
    else:
        return tl.load(shared_lens_ptr + req, mask=mask, other=0)


@triton.jit
def block_at(
    table_ptr, table_stride, req, in_request, seq_len, shared_len, mask,
    TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The block of tile `in_request` of a request, counted as in DecodePlan.starts; 0 where there is none."""
    _, first_tile, tiles = tiles_of(seq_len, shared_len, TILE, WINDOW)
    token = (first_tile + in_request % tiles) * TILE
    block_ptr = table_ptr + req.to(tl.int64) * table_stride + token // BLOCK_SIZE
    return tl.load(block_ptr, mask=mask & (token < seq_len), other=0)


@triton.jit(do_not_specialize=["num_reqs", "num_programs", "table_stride"])
def _plan_decode_kernel(
    seq_lens_ptr,
    shared_lens_ptr,
    table_ptr,
    num_tiles_ptr,
    starts_ptr,
    semaphores_ptr,
    num_reqs,
    num_programs,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
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
    shared_len = shared_len_of(shared_lens_ptr, req, valid)
    _, _, tiles = tiles_of(seq_len, shared_len, TILE, WINDOW)
    tiles = tl.where(valid, tiles, 0)
    tile_end = tl.cumsum(tiles, axis=0)
    total = tl.sum(tiles, axis=0) * NUM_KV_HEADS
    if tl.program_id(0) == 0:
        tl.store(num_tiles_ptr, total)
        for part in range(NUM_KV_HEADS):
            tl.store(semaphores_ptr + part * num_reqs + req, 0, mask=valid)
    program = tl.program_id(0) * BLOCK_PROGRAMS + tl.arange(0, BLOCK_PROGRAMS)
    begin = program * tl.cdiv(total, num_programs)
    before = (tile_end[None, :] * NUM_KV_HEADS <= begin[:, None]) & valid[None, :]
    first = tl.minimum(tl.sum(before.to(tl.int32), axis=1), num_reqs - 1)
    is_first = req[None, :] == first[:, None]
    in_request = begin - tl.sum(tl.where(is_first, (tile_end - tiles)[None, :], 0), axis=1) * NUM_KV_HEADS
    first_len = tl.sum(tl.where(is_first, seq_len[None, :], 0), axis=1)
    has_range = program < num_programs
    first_shared = shared_len_of(shared_lens_ptr, first, has_range)
    block = block_at(
        table_ptr, table_stride, first, in_request, first_len, first_shared, has_range, TILE, BLOCK_SIZE, WINDOW
    )
    start_ptr = starts_ptr + program * FIELDS
    tl.store(start_ptr, first, mask=has_range)
    tl.store(start_ptr + 1, in_request, mask=has_range)
    tl.store(start_ptr + 2, first_len, mask=has_range)
    tl.store(start_ptr + 3, block, mask=has_range)


def plan_decode(
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    cache: LayerCache,
    window: int | None,
    config: DecodeConfig | None = None,
    cascade: CascadeInputs | None = None,
) -> DecodePlan:
    """Plans one step of decodes for layers that share this `window`. seq_lens [n] int32, read on the device.

    Of out [.., num_heads, head_dim] and the cache only shapes, dtype and device count. cascade: None with a window.
    Calls in one stream may share the plan, concurrent ones not.
    """
    num_reqs, num_kv_heads = seq_lens.shape[0], cache.data.shape[2]
    group, head_dim = out.shape[1] // num_kv_heads, out.shape[2]
    config = config or decode_config(head_dim, out.dtype, num_reqs, cache.scales is not None)
    if cascade is not None and cache.block_size % config.tile:
        config = replace(config, occupancy=min(config.occupancy, 3))  # addresses of tokens take registers, too
    num_programs = config.occupancy * num_multiprocessors(out.device)

    def room(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=out.device)

    plan = DecodePlan(
        num_tiles=room(torch.int32, 1),
        starts=room(torch.int32, num_programs, FIELDS.value),
        semaphores=room(torch.int32, num_reqs * num_kv_heads),
        partial_out=room(torch.float32, num_programs, 2, group, head_dim),
        partial_stats=room(torch.float32, num_programs, 2, 2, group),
        num_reqs=num_reqs,
        window=window,
        config=config,
        cascade=cascade,
        results=None if cascade is None else room_for_results(cascade, out.shape[1], head_dim),
    )
    launch(
        _plan_decode_kernel, (cdiv(num_programs, PLAN_PROGRAMS),), out.device,
        seq_lens, None if cascade is None else cascade.shared_lens, block_table, plan.num_tiles, plan.starts,
        plan.semaphores, num_reqs, num_programs, block_table.stride(0),
        NUM_KV_HEADS=num_kv_heads, BLOCK_SIZE=cache.block_size, WINDOW=window or 0, TILE=config.tile,
        BLOCK_REQS=coarse_size(num_reqs), BLOCK_PROGRAMS=PLAN_PROGRAMS, num_warps=8,
    )  # fmt: skip
    return plan


@triton.jit
def range_of_program(starts_ptr, num_tiles_ptr):
    """A program's range among all tiles: how long ranges are, its begin and end; and what it begins with."""
    start_ptr = starts_ptr + tl.program_id(0) * FIELDS
    total = tl.load(num_tiles_ptr)
    req, in_request = tl.load(start_ptr), tl.load(start_ptr + 1)
    seq_len, block = tl.load(start_ptr + 2), tl.load(start_ptr + 3)
    length = tl.cdiv(total, tl.num_programs(0))
    position = tl.program_id(0) * length
    return length, position, tl.minimum(position + length, total), req, in_request, seq_len, block


@triton.jit
def next_item(req, in_request, seq_len, tiles, seq_lens_ptr, num_reqs, NUM_KV_HEADS: tl.constexpr):
    """The request that tile `in_request` is in, if not in `req`, which has `tiles` under each KV head."""
    if in_request == tiles * NUM_KV_HEADS:
        req += 1
        in_request = 0
        seq_len = tl.load(seq_lens_ptr + req, mask=req < num_reqs, other=0)
    return req, in_request, seq_len
