"""Batch-invariant linear in Triton: the inner dimension is added in one order for every number of rows, and not split.

Owns the tiles. Invariant: a row's result depends on that row and the weight alone, to the bit. Tiles differ with the
number of rows, and their products do not: each adds 16 elements of the inner dimension to what it has, from the first
to the last, by the same instruction, whose rows and columns do not know of each other. (An instruction of Hopper's
takes 64 rows, so no tile has fewer.)

Few rows are made of waiting: a program asks for all of its weights before it waits for the kernel ahead (`launch.py`),
and they go as far as the cache that all multiprocessors share.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.device_limits import has_large_shared_memory
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv


class Tiles(NamedTuple):
    """Rows and columns of a program's result, and its pipeline."""

    rows: int
    cols: int
    num_stages: int
    num_warps: int


FEW_ROWS, SOME_ROWS = 64, 1024
DEPTH = 64  # elements of the inner dimension at a time
FEW = Tiles(rows=64, cols=32, num_stages=8, num_warps=4)  # many programs, many bytes on their way, two at a time
SOME = Tiles(rows=128, cols=128, num_stages=4, num_warps=8)
MANY = Tiles(rows=128, cols=256, num_stages=3, num_warps=8)
SMALL = Tiles(rows=64, cols=64, num_stages=3, num_warps=4)  # where shared memory is small; and float32
LINE = tl.constexpr(128)  # bytes of a line of the cache
BAND = 8  # tiles of rows that use a weight one after the other, while the cache has it


def choose_tiles(x: Tensor) -> Tiles:
    if x.dtype == torch.float32 or not has_large_shared_memory(x.device):
        return SMALL
    return FEW if x.shape[0] <= FEW_ROWS else SOME if x.shape[0] <= SOME_ROWS else MANY


@triton.jit
def _fetch_weights(weight_ptr, col, IN_FEATURES: tl.constexpr):
    """Ask for the lines of these rows of the weight, and wait for none."""
    SIZE: tl.constexpr = LINE // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = triton.next_power_of_2((IN_FEATURES + SIZE - 1) // SIZE)
    inner = tl.minimum(tl.arange(0, LINES) * SIZE, IN_FEATURES - 1)
    line_ptr = weight_ptr + col.to(tl.int64)[:, None] * IN_FEATURES + inner[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line_ptr], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["num_rows"])
def _batch_invariant_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    x_stride,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    programs_of_band: tl.constexpr = BAND * tl.cdiv(OUT_FEATURES, TILE_COLS)
    band, in_band = tl.program_id(0) // programs_of_band, tl.program_id(0) % programs_of_band
    height = tl.minimum(tl.cdiv(num_rows, TILE_ROWS) - band * BAND, BAND)
    row = (band * BAND + in_band % height) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = in_band // height * TILE_COLS + tl.arange(0, TILE_COLS)
    inner = tl.arange(0, DEPTH)
    is_row = (row < num_rows)[:, None]
    x_ptr += row.to(tl.int64)[:, None] * x_stride + inner[None, :]
    weight_row = tl.minimum(col, OUT_FEATURES - 1)  # columns outside are taken from the last one, and not stored
    if PDL and EARLY:
        _fetch_weights(weight_ptr, weight_row, IN_FEATURES)
    if PDL:
        tl.extra.cuda.gdc_wait()
    weight_ptr += weight_row.to(tl.int64)[:, None] * IN_FEATURES + inner[None, :]
    acc = tl.zeros([TILE_ROWS, TILE_COLS], tl.float32)
    for start in range(0, IN_FEATURES, DEPTH):
        if IN_FEATURES % DEPTH == 0:
            x = tl.load(x_ptr + start, mask=is_row, other=0.0)
            weight = tl.load(weight_ptr + start)
        else:
            is_inside = (start + inner < IN_FEATURES)[None, :]
            x = tl.load(x_ptr + start, mask=is_row & is_inside, other=0.0)
            weight = tl.load(weight_ptr + start, mask=is_inside, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=col < OUT_FEATURES, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * OUT_FEATURES + col[None, :]
    mask = is_row & (col < OUT_FEATURES)[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


def batch_invariant_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See the function without `_triton`; rows of x may be strided, its last dimension and the weight may not."""
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    out = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    if num_rows:
        rows, cols, num_stages, num_warps = choose_tiles(x)
        launch(
            _batch_invariant_linear_kernel, (cdiv(num_rows, rows) * cdiv(out_features, cols),), x.device,
            x, weight, bias, out, num_rows, x.stride(0), OUT_FEATURES=out_features, IN_FEATURES=in_features,
            TILE_ROWS=rows, TILE_COLS=cols, DEPTH=DEPTH, BAND=BAND,
            EARLY=num_rows <= FEW_ROWS, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return out
