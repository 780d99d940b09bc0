"""Low-rank adapters in Triton: both products for blocks of rows that share an adapter.

Owns how they run on a GPU. What costs is not arithmetic but that more kernels stand between others. So of one row the
first product is a part of the layer's own (`skinny_gemv.py`); of more it splits the inputs until every multiprocessor
has some. Its parts are added up in order: by whoever is last to
leave one, or, of few rows, by each program of the second product. That adds to the layer's outputs in place, or applies
the gate on the way. Invariant: no sum depends on timing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.lora import AdapterRows
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.linear.skinny_gemv import Beside, GemvConfig, launch_gemv

CHUNK = 256  # inputs at a time
# Parts of the inputs, by how many rows there are: few rows leave most multiprocessors to others' parts.
SPLITS = [(8, 16), (512, 8)]
MAX_PARTS = 8192  # floats that a program of the second product adds up: splits * rows * rank


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _shrink_kernel(
    x_ptr,
    a_ptr,
    out_ptr,
    sums_ptr,
    semaphores_ptr,
    rows_ptr,
    block_slots_ptr,
    num_rows,
    num_slots,
    x_stride,
    INPUTS: tl.constexpr,
    RANKS: tl.constexpr,
    SPAN: tl.constexpr,
    SORTED: tl.constexpr,
    SUMMED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[split, row, ranks] = a[slot, ranks, SPAN inputs] x[row, the same]. A program: a block, a tile, a split.

    SUMMED: whoever is last to leave a part of a block and tile adds them up, into sums [row, ranks].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block, split = tl.program_id(0), tl.program_id(2)
    slot = tl.load(block_slots_ptr + block)
    if SORTED:
        row = tl.load(rows_ptr + block * BLOCK + tl.arange(0, BLOCK))
    if (slot < 0) | (slot >= num_slots):
        return
    rank = tl.program_id(1) * TILE + tl.arange(0, TILE)
    a_ptrs = a_ptr + slot.to(tl.int64) * (RANKS * INPUTS) + tl.minimum(rank, RANKS - 1)[:, None] * INPUTS
    out_ptr += split.to(tl.int64) * num_rows * RANKS
    if SORTED:
        is_row = row < num_rows
        row = tl.where(is_row, row, 0).to(tl.int64)
        acc = tl.zeros([BLOCK, TILE], tl.float32)
        for i in range(SPAN // CHUNK):
            col = split * SPAN + i * CHUNK + tl.arange(0, CHUNK)
            is_input = (col < INPUTS)[None, :]
            x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=is_row[:, None] & is_input, other=0.0)
            a = tl.load(a_ptrs + col[None, :], mask=is_input, other=0.0)
            acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
        mask = is_row[:, None] & (rank < RANKS)[None, :]
        place = row[:, None] * RANKS + rank[None, :]
        tl.store(out_ptr + place, acc, mask=mask)
        if SUMMED:
            tl.debug_barrier()  # every warp's stores come before the one thread's release
            PARTS: tl.constexpr = (INPUTS + SPAN - 1) // SPAN
            semaphore_ptr = semaphores_ptr + block * tl.num_programs(1) + tl.program_id(1)
            if tl.atomic_add(semaphore_ptr, 1, sem="acq_rel") == PARTS - 1:
                tl.store(semaphore_ptr, 0)
                parts_ptr = out_ptr - split.to(tl.int64) * num_rows * RANKS + place
                total = tl.load(parts_ptr, mask=mask, other=0.0, cache_modifier=".cg")  # past this one's L1 cache
                for part in tl.static_range(1, PARTS):
                    total += tl.load(parts_ptr + part * num_rows * RANKS, mask=mask, other=0.0, cache_modifier=".cg")
                tl.store(sums_ptr + place, total, mask=mask)
    else:
        sums = tl.zeros([TILE, CHUNK], tl.float32)
        for i in range(SPAN // CHUNK):
            col = split * SPAN + i * CHUNK + tl.arange(0, CHUNK)
            x = tl.load(x_ptr + block.to(tl.int64) * x_stride + col, mask=col < INPUTS, other=0.0)
            a = tl.load(a_ptrs + col[None, :], mask=(col < INPUTS)[None, :], other=0.0)
            sums += a.to(tl.float32) * x.to(tl.float32)[None, :]
        tl.store(out_ptr + block * RANKS + rank, tl.sum(sums, axis=1), mask=rank < RANKS)


@triton.jit
def _load_b(b_ptr, output, mask, first: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr):
    rank = first + tl.arange(0, RANK_BLOCK)
    return tl.load(b_ptr + output[:, None] * RANK + rank[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def _added(
    parts_ptr, b, b_ptr, bias_ptr, output, mask, row, is_row, num_rows,
    RANKS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr, SORTED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[BLOCK, TILE]: B (A x) + b of some outputs. parts_ptr: of their matrix; b_ptr, bias_ptr: of their slot; b: the
    first ranks of it, which are loaded already.
    """
    split = tl.arange(0, SPLITS_PADDED)
    bias = tl.load(bias_ptr + output, mask=mask, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK, TILE], tl.float32) + bias[None, :]
    for first in tl.static_range(0, RANK, RANK_BLOCK):
        if first > 0:
            b = _load_b(b_ptr, output, mask, first, RANK, RANK_BLOCK)
        rank = first + tl.arange(0, RANK_BLOCK)
        place = split[:, None, None] * (num_rows * RANKS) + row[None, :, None] * RANKS + rank[None, None, :]
        is_part = (split < SPLITS)[:, None, None] & is_row[None, :, None]
        shrunk = tl.sum(tl.load(parts_ptr + place, mask=is_part, other=0.0), axis=0).to(b.dtype)
        if SORTED:
            acc = tl.dot(shrunk, tl.trans(b), acc, input_precision="ieee")
        else:
            acc += tl.sum(shrunk.to(tl.float32)[:, None, :] * b.to(tl.float32)[None, :, :], axis=2)
    return acc


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _expand_kernel(
    outputs_ptr,
    parts_ptr,
    b_ptr,
    bias_ptr,
    out_ptr,
    rows_ptr,
    block_slots_ptr,
    num_rows,
    num_slots,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    RANKS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program: a block of rows, and a tile of the outputs of one of up to three matrices (FIRST, SECOND, THIRD
    outputs). GATED: of the first of two, and the same outputs of the second; out is then [num_rows, FIRST].
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if SORTED:
            tl.extra.cuda.gdc_wait()
    WIDTH: tl.constexpr = FIRST + SECOND + THIRD
    block = tl.program_id(1)
    slot = tl.load(block_slots_ptr + block)
    if SORTED:
        row = tl.load(rows_ptr + block * BLOCK + tl.arange(0, BLOCK))
    else:
        row = block + tl.arange(0, BLOCK)
    is_row = row < num_rows
    row = tl.where(is_row, row, 0).to(tl.int64)

    tile = tl.program_id(0)
    SECOND_TILE: tl.constexpr = (FIRST + TILE - 1) // TILE
    THIRD_TILE: tl.constexpr = SECOND_TILE + (SECOND + TILE - 1) // TILE
    matrix, begin, size = 0, 0, FIRST
    if not GATED:
        matrix = (tile >= SECOND_TILE).to(tl.int32) + (tile >= THIRD_TILE).to(tl.int32)
        tile -= tl.where(matrix == 0, 0, tl.where(matrix == 1, SECOND_TILE, THIRD_TILE))
        begin = tl.where(matrix == 0, 0, tl.where(matrix == 1, FIRST, FIRST + SECOND))
        size = tl.where(matrix == 0, FIRST, tl.where(matrix == 1, SECOND, THIRD))
    local = tile * TILE + tl.arange(0, TILE)
    output, valid = begin + local, local < size
    has_adapter = (slot >= 0) & (slot < num_slots)
    known = tl.where(has_adapter, slot, 0).to(tl.int64)
    b_ptr += known * (WIDTH * RANK)
    bias_ptr += known * WIDTH
    b = _load_b(b_ptr, output, valid & has_adapter, 0, RANK, RANK_BLOCK)
    if GATED:
        up_b = _load_b(b_ptr, output + FIRST, valid & has_adapter, 0, RANK, RANK_BLOCK)
    if PDL and not SORTED:
        tl.extra.cuda.gdc_wait()
    if (slot < 0) | (not GATED and not has_adapter):
        return

    place = row[:, None] * WIDTH + output[None, :]
    mask = is_row[:, None] & valid[None, :]
    dtype = out_ptr.dtype.element_ty
    result = tl.load(outputs_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(outputs_ptr + place + FIRST, mask=mask, other=0.0).to(tl.float32)
    if has_adapter:
        result += _added(
            parts_ptr + matrix * RANK, b, b_ptr, bias_ptr, output, valid, row, is_row, num_rows,
            RANKS, RANK, RANK_BLOCK, SPLITS, SPLITS_PADDED, SORTED, BLOCK, TILE,
        )  # fmt: skip
        if GATED:
            up += _added(
                parts_ptr + RANK, up_b, b_ptr, bias_ptr, output + FIRST, valid, row, is_row, num_rows,
                RANKS, RANK, RANK_BLOCK, SPLITS, SPLITS_PADDED, SORTED, BLOCK, TILE,
            )  # fmt: skip
    if GATED:
        gate = result.to(dtype).to(tl.float32)
        slope = gate
        if GELU:  # as in silu_and_mul_triton
            slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        result = (gate / (1.0 + tl.exp(-slope))).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        place = row[:, None] * FIRST + output[None, :]
    tl.store(out_ptr + place, result.to(dtype), mask=mask)


def shrink_triton(x: Tensor, a: Tensor, rows: AdapterRows) -> Tensor:
    """See `lora.shrink`."""
    num_rows, num_inputs = x.shape
    num_ranks = a.shape[1]
    span = _span(num_inputs, num_rows, rows)
    num_splits = cdiv(num_inputs, span)
    out = torch.empty((num_splits, num_rows, num_ranks), dtype=torch.float32, device=x.device)
    num_blocks, block_size = _blocks(rows)
    tile = 16 if num_ranks % 32 or num_rows <= 32 else 32
    num_tiles, semaphores, sums = cdiv(num_ranks, tile), rows.semaphores, None
    is_sorted = rows.rows is not None
    if is_sorted and num_splits > 1 and semaphores is not None and num_blocks * num_tiles <= len(semaphores):
        sums = torch.empty((1, num_rows, num_ranks), dtype=torch.float32, device=x.device)
    launch(
        _shrink_kernel, (num_blocks, num_tiles, num_splits), x.device,
        x, a, out, sums, semaphores, rows.rows, rows.block_slots, num_rows, rows.num_slots, x.stride(0),
        INPUTS=num_inputs, RANKS=num_ranks, SPAN=span, SORTED=is_sorted, SUMMED=sums is not None,
        BLOCK=block_size, TILE=tile, CHUNK=CHUNK, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out if sums is None else sums


def _span(num_inputs: int, num_rows: int, rows: AdapterRows) -> int:
    """Inputs of a program of the first product."""
    num_splits = next((splits for most, splits in SPLITS if num_rows <= most), 1)
    if rows.is_fixed:
        num_splits = 8
    return max(1, cdiv(num_inputs, CHUNK * num_splits)) * CHUNK


def _blocks(rows: AdapterRows) -> tuple[int, int]:
    """How many blocks there are, and the rows of each."""
    assert rows.block_slots is not None
    return rows.block_slots.shape[0], 1 if rows.rows is None else rows.rows.shape[1]


def linear_and_shrink_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, rows: AdapterRows, config: GemvConfig
) -> tuple[Tensor, Tensor]:
    """See `lora.linear_and_shrink`, of one row."""
    out = torch.empty((1, weight.shape[0]), dtype=x.dtype, device=x.device)
    shrunk = torch.empty((1, 1, a.shape[1]), dtype=torch.float32, device=x.device)
    beside = Beside(a, rows.slots, shrunk)
    launch_gemv(x, None, None, 0.0, weight, bias, out, None, config, False, False, beside)
    return out, shrunk


def expand_triton(
    outputs: Tensor,
    shrunk: Tensor,
    b: Tensor,
    bias: Tensor,
    sizes: Sequence[int],
    rows: AdapterRows,
    activation: str | None = None,
) -> Tensor:
    """See `lora.expand`."""
    num_rows = outputs.shape[0]
    num_splits, rank = shrunk.shape[0], b.shape[2]
    is_gated = activation is not None
    out = torch.empty((num_rows, sizes[0]), dtype=outputs.dtype, device=outputs.device) if is_gated else outputs
    first, second, third = (*sizes, 0, 0)[:3]
    num_blocks, block_size = _blocks(rows)
    tile, num_warps = (256, 8) if rows.rows is not None and num_rows <= SPLITS[-1][0] else (128, 4)
    splits_padded = next_power_of_2(num_splits)
    rank_block = 16
    while rank % (2 * rank_block) == 0 and splits_padded * block_size * 2 * rank_block <= MAX_PARTS:
        rank_block *= 2
    num_tiles = cdiv(first, tile) if is_gated else sum(cdiv(size, tile) for size in (first, second, third))
    launch(
        _expand_kernel, (num_tiles, num_blocks), outputs.device,
        outputs, shrunk, b, bias, out, rows.rows, rows.block_slots, num_rows, rows.num_slots,
        FIRST=first, SECOND=second, THIRD=third, RANKS=shrunk.shape[2], RANK=rank, RANK_BLOCK=rank_block,
        SPLITS=num_splits, SPLITS_PADDED=splits_padded, GATED=is_gated, GELU=activation == "gelu_tanh",
        SORTED=rows.rows is not None, BLOCK=block_size, TILE=tile, num_warps=num_warps,
    )  # fmt: skip
    return out
