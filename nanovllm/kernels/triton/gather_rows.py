"""Gather of rows (embedding lookup) in Triton.

Owns how rows are copied on a GPU: a program takes a row, or a part of a wide one. Invariant: each element is read and
written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2

BLOCK = 1024


@triton.jit(do_not_specialize_on_alignment=["index_ptr"])
def _gather_rows_kernel(
    table_ptr, table_stride, index_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + place).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    values = tl.load(table_ptr + row * table_stride + column, mask=mask)
    tl.store(out_ptr + place * WIDTH + column, values, mask=mask)


def gather_rows_triton(table: Tensor, index: Tensor) -> Tensor:
    """See `gather_rows.gather_rows`; the last dimension of the table is contiguous."""
    num_rows, width = index.shape[0], table.shape[1]
    out = torch.empty((num_rows, width), dtype=table.dtype, device=table.device)
    if num_rows:
        block = min(next_power_of_2(width), BLOCK)
        launch(
            _gather_rows_kernel, (num_rows, cdiv(width, block)), table.device,
            table, table.stride(0), index, out, WIDTH=width, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
