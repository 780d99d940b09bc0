"""A product for each head in Triton: for a head, a tile of tokens times a tile of its matrix.

Owns the tiles. Invariant: a row's result depends on that row and its head's matrix alone, to the bit: all tiles have at
least 64 rows, so one kind of instruction adds the inputs up, from the first to the last (see `batch_invariant/`).

A matrix may lie either way round: both come from one tensor of a checkpoint.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2

FEW_ROWS = 64
DEPTH = 64  # inputs at a time


@triton.jit(do_not_specialize=["num_rows"])
def _head_linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    x_stride_row,
    x_stride_head,
    out_stride_row,
    out_stride_head,
    WEIGHT_HEAD: tl.constexpr,
    WEIGHT_IN: tl.constexpr,
    WEIGHT_OUT: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0) % NUM_HEADS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) // NUM_HEADS * COLS + tl.arange(0, COLS)
    inner = tl.arange(0, DEPTH)
    is_row, is_col = (row < num_rows)[:, None], (col < OUTPUTS)[None, :]
    weight_ptr += head * WEIGHT_HEAD + inner[:, None] * WEIGHT_IN + col[None, :] * WEIGHT_OUT
    x_ptr += row.to(tl.int64)[:, None] * x_stride_row + head * x_stride_head + inner[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, INPUTS, DEPTH):
        is_inside = start + inner < INPUTS
        x = tl.load(x_ptr + start, mask=is_row & is_inside[None, :], other=0.0)
        weight = tl.load(weight_ptr + start * WEIGHT_IN, mask=is_inside[:, None] & is_col, other=0.0)
        acc = tl.dot(x, weight, acc, input_precision="ieee")
    place = row.to(tl.int64)[:, None] * out_stride_row + head * out_stride_head + col[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=is_row & is_col)


def head_linear_triton(x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    """See `head_linear.head_linear`."""
    (num_rows, num_heads, inputs), outputs = x.shape, weight.shape[2]
    if out is None:
        out = torch.empty(num_rows, num_heads, outputs, dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    rows, cols, depth = 64, min(32 if num_rows <= FEW_ROWS else 128, next_power_of_2(outputs)), DEPTH
    if x.dtype == torch.float32:
        cols, depth = min(cols, 32), 32
    launch(
        _head_linear_kernel, (num_heads * cdiv(outputs, cols), cdiv(num_rows, rows)), x.device,
        x, weight, out, num_rows, x.stride(0), x.stride(1), out.stride(0), out.stride(1), *weight.stride(),
        NUM_HEADS=num_heads, INPUTS=inputs, OUTPUTS=outputs, ROWS=rows, COLS=max(16, cols), DEPTH=depth,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
