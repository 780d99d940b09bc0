"""Batch-invariant linear in Triton: one tile shape for every number of rows, and no split of the inner dimension.

Owns the launch. Invariant: what a program does for a row depends on sizes of the weight alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.sizes import cdiv

TILE_ROWS, TILE_COLS, DEPTH = 64, 64, 64


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
):
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = tl.program_id(0) * TILE_COLS + tl.arange(0, TILE_COLS)
    inner = tl.arange(0, DEPTH)
    x_ptr += row.to(tl.int64)[:, None] * x_stride + inner[None, :]
    weight_ptr += col.to(tl.int64)[:, None] * IN_FEATURES + inner[None, :]
    acc = tl.zeros([TILE_ROWS, TILE_COLS], tl.float32)
    for start in range(0, IN_FEATURES, DEPTH):
        is_inside = (start + inner < IN_FEATURES)[None, :]
        x = tl.load(x_ptr + start, mask=(row < num_rows)[:, None] & is_inside, other=0.0)
        weight = tl.load(weight_ptr + start, mask=(col < OUT_FEATURES)[:, None] & is_inside, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=col < OUT_FEATURES, other=0.0).to(tl.float32)[None, :]
    place = row.to(tl.int64)[:, None] * OUT_FEATURES + col[None, :]
    mask = (row < num_rows)[:, None] & (col < OUT_FEATURES)[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


def batch_invariant_linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See the function without `_triton`; rows of x may be strided, its last dimension and the weight may not."""
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    out = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    grid = (cdiv(out_features, TILE_COLS), cdiv(num_rows, TILE_ROWS))
    if num_rows:
        _batch_invariant_linear_kernel[grid](
            x, weight, bias, out, num_rows, x.stride(0), OUT_FEATURES=out_features, IN_FEATURES=in_features,
            TILE_ROWS=TILE_ROWS, TILE_COLS=TILE_COLS, DEPTH=DEPTH, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out
