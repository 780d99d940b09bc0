"""RMS norm in Triton, alone and with the residual addition before it.

Owns how the norm runs on a GPU: every row is read once, held in registers and written once; short rows (the heads of a
QK norm) share a program. Invariant: rounds exactly where the reference rounds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2

# Elements that a program holds at a time. Enough for a short row to fill 16-byte accesses, few enough for registers.
ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_rows", "rows_per_group"])
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    num_rows,
    rows_per_group,
    x_stride_group,
    x_stride_row,
    residual_stride,
    eps,
    ADD: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (row < num_rows) & (col < DIM)
    weight = tl.load(weight_ptr + col, mask=col < DIM, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x_offset = (row // rows_per_group) * x_stride_group + (row % rows_per_group) * x_stride_row + col
    x = tl.load(x_ptr + x_offset, mask=mask, other=0.0)
    dtype = x.dtype
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + col, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + row * DIM + col, x, mask=mask)
    value = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / DIM + eps)
    normed = (value * scale[:, None]).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * DIM + col, (normed * weight).to(dtype), mask=mask)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rms_norm.rms_norm`. Copies first only if the last dimension is strided or more than two others are."""
    if x.dim() > 3 or x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() != 3:
        groups, heads, group_stride, row_stride = x.numel() // x.shape[-1], 1, x.shape[-1], 0
        if x.dim() == 2:
            group_stride = x.stride(0)
    else:
        groups, heads, group_stride, row_stride = x.shape[0], x.shape[1], x.stride(0), x.stride(1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows = groups * heads
    if num_rows:
        grid, block_rows, block_dim, num_warps = _tiling(num_rows, x.shape[-1])
        launch(
            _rms_norm_kernel, grid, x.device,
            x, None, weight, out, None, num_rows, heads, group_stride, row_stride, 0, eps,
            ADD=False, DIM=x.shape[-1], BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim, num_warps=num_warps,
        )  # fmt: skip
    return out


def add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `rms_norm.add_rms_norm`; rows of `x` and `residual` may be strided, their last dimension may not."""
    num_rows, dim = x.shape
    out, total = (torch.empty((num_rows, dim), dtype=x.dtype, device=x.device) for _ in range(2))
    if num_rows:
        grid, block_rows, block_dim, num_warps = _tiling(num_rows, dim)
        launch(
            _rms_norm_kernel, grid, x.device,
            x, residual, weight, out, total, num_rows, 1, x.stride(0), 0, residual.stride(0), eps,
            ADD=True, DIM=dim, BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim, num_warps=num_warps,
        )  # fmt: skip
    return out, total


def _tiling(num_rows: int, dim: int) -> tuple[tuple[int], int, int, int]:
    block_dim = next_power_of_2(dim)
    block_rows = max(1, ELEMENTS // block_dim) if dim <= 256 else 1
    num_warps = min(max(block_rows * block_dim // 512, 2), 16)
    return (cdiv(num_rows, block_rows),), block_rows, block_dim, num_warps
