"""The product of a few rows with quantized weights, by the matrix unit: codes become 16-bit numbers in registers.

Owns that kernel; which products it is for is `quantized_linear.py`'s to say. Codes and inputs are asked for some steps
ahead; codes go from shared memory to registers, become numbers there, and are the operand that the matrix unit takes
from registers, so no number of 16 bits is ever stored. Long inputs are split over programs, as in `skinny_gemm.py`.
Invariant: a group's scale multiplies the float32 sum of its products, so codes are multiplied as they are, and the
parts of a sum are added up in the order of the inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.linear.skinny_gemm import new_semaphores, sum_in_order

# Two bytes, $2, are two inputs in their lower halves, which become the two 16-bit numbers of $0, and two in their upper
# ones, those of $1: a byte with four bits goes below the exponent of 1024 (or 128).
_SPLIT = (
    "{{.reg .b32 a, b, c; mov.b32 c, {0}; and.b32 a, $2, 0x0f0f; shr.b32 b, $2, 4; and.b32 b, b, 0x0f0f;"
    "prmt.b32 $0, a, c, 0x4140; prmt.b32 $1, b, c, 0x4140;}}"
)
SPLIT_FLOAT16, SPLIT_BFLOAT16 = tl.constexpr(_SPLIT.format("0x64646464")), tl.constexpr(_SPLIT.format("0x43434343"))


@triton.jit
def split_int4(codes, dtype: tl.constexpr):
    """Of each byte the lower and the upper four bits, with 1024 (or, of bfloat16, 128) added."""
    if dtype == tl.float16:
        return tl.inline_asm_elementwise(
            SPLIT_FLOAT16, "=&r,=&r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            SPLIT_BFLOAT16, "=&r,=&r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )


@triton.jit
def e2m1_numbers(bits, dtype: tl.constexpr):
    """Four bits each as what they stand for, exact: put where the type has exponent and mantissa, and scaled by what
    the exponents differ; a denormal is one there, too. bfloat16 is not asked to multiply denormals."""
    if dtype == tl.float16:
        bits = bits.to(tl.uint16)
        return (((bits & 7) << 9) | ((bits & 8) << 12)).to(tl.float16, bitcast=True) * 16384.0
    else:
        bits = bits.to(tl.uint32)
        size = ((bits & 7) << 9).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
        return tl.where(bits >= 8, -size, size).to(dtype)


@triton.jit
def e8m0_numbers(bits):
    return (bits.to(tl.uint32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def byte_numbers(codes, dtype: tl.constexpr):
    if (codes.dtype == tl.int8) and (dtype == tl.bfloat16):
        # Below the exponent of 2^23, 128 added to each: an integer is slower to convert.
        bits = codes.to(tl.uint8, bitcast=True).to(tl.uint32) ^ 0x4B000080
        return (bits.to(tl.float32, bitcast=True) - 8388736.0).to(dtype)
    else:
        return codes.to(dtype)


@triton.jit(do_not_specialize=["num_rows", "num_groups", "steps"])
def _quantized_gemm_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    low_ptr,
    bias_ptr,
    out_ptr,
    part_ptr,
    semaphores_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    x_stride,
    num_groups,
    steps,
    steps_per_group,
    SPLITS: tl.constexpr,
    GROUPED: tl.constexpr,
    IS_INT4: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has OUTPUTS outputs of ROWS rows and `steps` steps of STEP inputs, one of SPLITS parts of them.

    GROUPED: scales are of groups, of which a step has no more than one; else of outputs. zero_ptr, low_ptr, bias_ptr:
    may be None. Who is last to leave its sums adds them up.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BYTES: tl.constexpr = STEP // 2 if IS_INT4 else STEP
    NOTHING: tl.constexpr = 1024.0 if dtype == tl.float16 else 128.0
    row_tiles = tl.cdiv(num_rows, ROWS)
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    row = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    output = tile // row_tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    weight_row = tl.minimum(output, num_outputs - 1)
    col = tl.arange(0, BYTES)
    row_bytes = num_inputs // 2 if IS_INT4 else num_inputs
    codes_ptr += weight_row.to(tl.int64)[:, None] * row_bytes + split * steps * BYTES + col[None, :]
    x_col = col // 16 * 32 + col % 16 if IS_INT4 else col
    x_ptr += tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * x_stride + split * steps * STEP + x_col[None, :]
    group_place = weight_row * num_groups

    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for i in tl.range(0, steps, num_stages=STAGES):
        codes = tl.load(codes_ptr + i * BYTES)
        group = group_place
        if GROUPED:
            group += (split * steps + i) // steps_per_group
        sums = tl.zeros([OUTPUTS, ROWS], tl.float32) if GROUPED else acc
        if IS_INT4:
            off = tl.full([OUTPUTS], NOTHING, dtype)
            if zero_ptr is not None:
                off += (tl.load(zero_ptr + group) + 8).to(dtype)
            elif low_ptr is None:
                off += 8.0
            first = tl.load(x_ptr + i * STEP)
            second = tl.load(x_ptr + i * STEP + 16)
            low_bits, high_bits = split_int4(codes, dtype)
            sums = tl.dot(low_bits - off[:, None], tl.trans(first), sums)
            sums = tl.dot(high_bits - off[:, None], tl.trans(second), sums)
            if low_ptr is not None:
                sum_of_x = tl.sum(first.to(tl.float32), axis=1) + tl.sum(second.to(tl.float32), axis=1)
        else:
            x = tl.load(x_ptr + i * STEP)
            numbers = byte_numbers(codes, dtype)
            if zero_ptr is not None:
                numbers = (numbers.to(tl.float32) - tl.load(zero_ptr + group).to(tl.float32)[:, None]).to(dtype)
            sums = tl.dot(numbers, tl.trans(x), sums)
            if low_ptr is not None:
                sum_of_x = tl.sum(x.to(tl.float32), axis=1)
        if GROUPED:
            acc += sums * tl.load(scale_ptr + group).to(tl.float32)[:, None]
            if low_ptr is not None:
                acc += tl.load(low_ptr + group).to(tl.float32)[:, None] * sum_of_x[None, :]
        else:
            acc = sums
    if not GROUPED:
        acc = acc * tl.load(scale_ptr + weight_row).to(tl.float32)[:, None]

    is_last = True
    if SPLITS > 1:
        PART: tl.constexpr = OUTPUTS * ROWS
        in_part = tl.arange(0, OUTPUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        tile_part_ptr = part_ptr + tile.to(tl.int64) * (SPLITS * PART) + in_part
        tl.store(tile_part_ptr + split * PART, acc)
        tl.debug_barrier()  # every warp's stores come before the one thread's release
        is_last = tl.atomic_add(semaphores_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            tl.store(semaphores_ptr + tile, 0)
            acc = sum_in_order(tile_part_ptr, SPLITS, PART)
    if is_last:
        valid = (output < num_outputs)[:, None]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + output[:, None], mask=valid, other=0.0).to(tl.float32)
        out_offset = row[None, :].to(tl.int64) * num_outputs + output[:, None]
        tl.store(out_ptr + out_offset, acc.to(dtype), mask=valid & (row < num_rows)[None, :])


class GemmConfig(NamedTuple):
    """rows, outputs: per program. step: inputs at a time, in one group. splits: of the inputs, over programs.

    stages: steps whose codes and inputs are here or on their way.
    """

    rows: int
    outputs: int
    num_warps: int
    step: int
    splits: int
    stages: int


def launch_gemm(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    low: Tensor | None,
    bias: Tensor | None,
    config: GemmConfig,
    semaphores: Tensor | None,
) -> Tensor:
    """`quantized_linear.quantized_linear` of some rows."""
    (num_rows, num_inputs), (num_outputs, num_groups) = x.shape, scale.shape
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    tiles = cdiv(num_outputs, config.outputs) * cdiv(num_rows, config.rows)
    parts = None
    if config.splits > 1:
        part = config.outputs * config.rows
        parts = torch.empty(tiles * config.splits * part, dtype=torch.float32, device=x.device)
        semaphores = new_semaphores(x.device) if semaphores is None else semaphores
    launch(
        _quantized_gemm_kernel, (tiles * config.splits,), x.device,
        x, codes, scale, zero, low, bias, out, parts, semaphores, num_rows, num_outputs, num_inputs, x.stride(0),
        num_groups, num_inputs // config.step // config.splits, num_inputs // num_groups // config.step,
        SPLITS=config.splits, GROUPED=num_groups > 1, IS_INT4=codes.dtype == torch.uint8, ROWS=config.rows,
        OUTPUTS=config.outputs, STEP=config.step, STAGES=config.stages,
        num_warps=config.num_warps,
    )  # fmt: skip
    return out


def rows_of_tile(num_rows: int, most: int) -> int:
    return min(most, max(16, next_power_of_2(num_rows)))
