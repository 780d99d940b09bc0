"""Triton twin of `quantized_linear.py`: products straight from the codes, and what more rows need.

Owns which kernel takes which product, dense copies and rounded inputs. Invariant: a row's result depends on that row
and on the number of rows, which picks the kernel.

    rows      product
    1         quantized_gemv.py: multiply and add
    2 .. 256  quantized_gemm.py: codes to 16 bits in registers, then the matrix unit; FP8 with rounded inputs: cuBLAS
    more      FP8 with rounded inputs: cuBLAS, in FP8; else a dense copy, which many rows pay for, and cuBLAS
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.quantized_linear import NormOfRow, QuantizedWeight, RowRounding
from nanovllm.kernels.triton.common.device_limits import has_fp8, has_large_shared_memory
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.linear.parts import round_to_codes, scale_of_largest
from nanovllm.kernels.triton.linear.quantized_gemm import (
    GemmConfig,
    e2m1_numbers,
    e8m0_numbers,
    launch_gemm,
    rows_of_tile,
)
from nanovllm.kernels.triton.linear.quantized_gemv import LANE_INPUTS, GemvConfig, launch_gemv
from nanovllm.kernels.triton.linear.skinny_gemm import MAX_TILES

NUM_PROGRAMS = 384  # three for each multiprocessor of an H100

Config = GemvConfig | GemmConfig


def choose(x: Tensor, weight: QuantizedWeight) -> Config | None:
    """The kernel for x [num_rows, inputs]; None: none is made for it."""
    (num_rows, num_inputs), codes, num_groups = x.shape, weight.codes, weight.scale.shape[1]
    if (
        num_rows == 0
        or x.dtype not in (torch.float16, torch.bfloat16)
        or x.stride(1) != 1
        or num_inputs % num_groups
        or not codes.is_contiguous()
        or (codes.dtype == torch.float8_e4m3fn and not has_fp8(codes.device))
        or weight.is_e2m1  # a mixture has a kernel for it
    ):
        return None
    group_size = num_inputs // num_groups
    step = next((n for n in (128, 64, 32) if group_size % n == 0), None)
    if step is None:
        return None
    if num_rows == 1:
        return gemv_config(num_inputs, codes.dtype == torch.uint8)
    return _gemm_config(num_rows, codes, num_inputs, step)


def gemv_config(num_inputs: int, is_int4: bool, gated: bool = False) -> GemvConfig:
    """The rules are what sweeps over layers of an 8B model on an H200 found fastest. All warps lie along the inputs, so
    nothing of a row is computed twice in a program."""
    per_lane, most = (32, 128) if is_int4 else (16, 128 if gated else 256)
    most = max(most, next_power_of_2(cdiv(num_inputs, 4 * per_lane)))  # 4 chunks fit into registers
    lanes = min(1024, most, max(32, next_power_of_2(cdiv(num_inputs, per_lane))))
    num_warps, chunks = lanes // 32, cdiv(num_inputs, lanes * per_lane)
    if is_int4:
        if gated:
            return GemvConfig(4, lanes, num_warps, ahead=1, programs=528)
        return GemvConfig(8, lanes, num_warps) if chunks == 1 else GemvConfig(8, lanes, num_warps, 3, programs=264)
    if gated:
        return GemvConfig(2, lanes, num_warps, ahead=min(2 * chunks, 4), programs=396)
    return GemvConfig(8 if chunks == 1 else 2, lanes, num_warps, ahead=min(chunks, 3), programs=264)


def _gemm_config(num_rows: int, codes: Tensor, num_inputs: int, step: int) -> GemmConfig | None:
    """The rules are what sweeps over layers of an 8B model on an H100 found fastest."""
    is_few, is_wide = num_rows <= 16, codes.dtype == torch.uint8 and step == 128
    if num_rows > (256 if step == 128 else 128):
        return None
    rows = rows_of_tile(num_rows, 128 if has_large_shared_memory(codes.device) else 64)
    outputs, num_warps = (128, 4 if is_few else 8) if is_wide else (64, 4)
    stages = (4 if is_wide else 6) if is_few else (3 if step == 128 else 5)
    tiles, steps = cdiv(codes.shape[0], outputs), num_inputs // step
    most = 4 if is_few or (num_rows <= 64 and not is_wide) else 2
    wanted = min(most, max(1, NUM_PROGRAMS // tiles))
    splits = next(n for n in range(min(steps, wanted), steps + 1) if steps % n == 0)
    if tiles * cdiv(num_rows, rows) > MAX_TILES and splits > 1:
        return None
    return GemmConfig(rows, outputs, num_warps, step, splits, stages)


def quantized_linear_triton(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, config: Config, semaphores: Tensor | None = None
) -> Tensor:
    """`quantized_linear.quantized_linear`, where `choose` gave a config. semaphores: `skinny_gemm.new_semaphores`'s."""
    codes, scale, zero, _, low = weight
    if isinstance(config, GemvConfig):
        out = torch.empty((1, codes.shape[0]), dtype=x.dtype, device=x.device)
        launch_gemv(x, None, weight, bias, out, config)
        return out
    return launch_gemm(x, codes, scale, zero, low, bias, config, semaphores)


def fuses_norm(x: Tensor, norm_weight: Tensor) -> bool:
    """Whether every program norms its row itself."""
    return norm_weight.dtype == x.dtype


def fuses_rounding(weight: QuantizedWeight, rounding: RowRounding) -> bool:
    """Whether inputs that share a scale are those of some lanes of a warp."""
    if rounding.kind == "fp8" and not has_fp8(weight.codes.device):
        return False
    lanes, rest = divmod(rounding.group_size or 0, LANE_INPUTS[weight.codes.dtype])
    return not rest and (not lanes or 32 % lanes == 0)


def fused_row_triton(
    x: Tensor,
    norm: NormOfRow | None,
    weight: QuantizedWeight,
    bias: Tensor | None,
    rounding: RowRounding | None,
    gate: str | None,
) -> tuple[Tensor, Tensor]:
    """`quantized_linear.fused_row`."""
    num_outputs = weight.codes.shape[0] // (1 if gate is None else 2)
    config = gemv_config(x.shape[1], weight.codes.dtype == torch.uint8, gate is not None)
    out = torch.empty((1, num_outputs), dtype=x.dtype, device=x.device)
    total = launch_gemv(x, norm, weight, bias, out, config, rounding, gate)
    return out, total


# --- a dense copy, and inputs rounded to 8 bits --------------------------------------------------------


@triton.jit
def _dequantize_kernel(
    codes_ptr, scale_ptr, zero_ptr, low_ptr, out_ptr, num_inputs, stride_output, stride_group, group_size,
    IS_INT4: tl.constexpr, IS_E2M1: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """stride_output, stride_group: of scales, and of what else groups have. IS_INT4: two codes in a byte; they may be
    e2m1."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    output = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < num_inputs
    if IS_INT4:
        place = output * (num_inputs // 2) + col // 32 * 16 + col % 16
        byte = tl.load(codes_ptr + place, mask=mask, other=0).to(tl.int32)
        bits = (byte >> (col % 32 // 16 * 4)) & 15
        if IS_E2M1:
            values = e2m1_numbers(bits, tl.float32)
        else:
            values = bits.to(tl.float32)
            if low_ptr is None:
                values -= 8.0
    else:
        values = tl.load(codes_ptr + output * num_inputs + col, mask=mask, other=0.0).to(tl.float32)
    group = output * stride_output + col // group_size * stride_group
    if zero_ptr is not None:
        values -= tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + group, mask=mask, other=0)
    values *= e8m0_numbers(scale) if IS_E2M1 else scale.to(tl.float32)
    if low_ptr is not None:
        values += tl.load(low_ptr + group, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + output * num_inputs + col, values.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_triton(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """`quantized_linear.dequantize`."""
    codes, scale, zero, group_size, low = weight
    is_int4 = codes.dtype == torch.uint8
    num_outputs, num_inputs = codes.shape[0], codes.shape[1] * (2 if is_int4 else 1)
    out = torch.empty((num_outputs, num_inputs), dtype=dtype, device=codes.device)
    launch(
        _dequantize_kernel, (num_outputs, cdiv(num_inputs, 1024)), codes.device,
        codes, scale, zero, low, out, num_inputs, *scale.stride(), group_size if scale.shape[1] > 1 else num_inputs,
        IS_INT4=is_int4, IS_E2M1=weight.is_e2m1, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _quantize_rows_kernel(
    x_ptr, codes_ptr, scale_ptr, given_ptr, num_inputs, x_stride, num_groups, group_size,
    IS_FP8: tl.constexpr, GIVEN: tl.constexpr, ROUND: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """ROUND: codes_ptr gets the numbers that the codes mean, and there are no scales."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    col = group * group_size + place
    mask = (group < num_groups) & (place < group_size) & (col < num_inputs)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    if GIVEN:
        scale = tl.load(given_ptr) + tl.zeros([GROUPS, 1], tl.float32)
    else:
        scale = scale_of_largest(tl.max(tl.abs(x), axis=1), IS_FP8)[:, None]
    codes = round_to_codes(x / scale, IS_FP8)
    offset = row * num_inputs + col
    if ROUND:
        tl.store(codes_ptr + offset, (codes.to(tl.float32) * scale).to(codes_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(codes_ptr + offset, codes.to(codes_ptr.dtype.element_ty), mask=mask)
        tl.store(scale_ptr + row * num_groups + group, scale, mask=group < num_groups)


def _launch_rows(
    x: Tensor, codes: Tensor, scales: Tensor | None, kind: str, group_size: int | None, given: Tensor | None
) -> None:
    num_rows, num_inputs = x.shape
    size = group_size or num_inputs
    num_groups, block = cdiv(num_inputs, size), next_power_of_2(size)
    groups = min(next_power_of_2(num_groups), max(1, 4096 // block))
    launch(
        _quantize_rows_kernel, (num_rows, cdiv(num_groups, groups)), x.device,
        x, codes, scales, given, num_inputs, x.stride(0), num_groups, size, IS_FP8=kind == "fp8",
        GIVEN=given is not None, ROUND=scales is None, GROUPS=groups, BLOCK=block,
        num_warps=4 if block * groups <= 4096 else 8,
    )  # fmt: skip


def round_rows_triton(x: Tensor, kind: str, group_size: int | None, scale: Tensor | None) -> Tensor:
    """`quantized_linear.round_rows`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rows(x, out, None, kind, group_size, scale)
    return out


def quantize_rows_triton(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """`quantized_linear.quantize_rows`, with a scale a row."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn if kind == "fp8" else torch.int8, device=x.device)
    scales = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    _launch_rows(x, codes, scales, kind, None, None)
    return codes, scales
