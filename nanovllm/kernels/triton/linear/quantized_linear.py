"""Quantized linear in Triton: weight-only GEMM of up to 64 rows, dequantization, inputs rounded to 8 bits.

Owns how codes become numbers on the way to the matrix unit, and which kernel takes which product. A decode step reads
every code once and computes little, so each program asks for its codes before it waits for the kernel ahead
(`launch.py`), and long inputs are split over programs, as in `skinny_gemm.py`. Invariant: a group's scale
multiplies the float32 sum of its products, so codes are multiplied as they are, and the parts of a sum are added up in
the order of the inputs.

    rows      product
    1         `quantized_gemv.py`: multiply and add
    2 .. 64   the kernel here: codes to 16 bits in registers, then the matrix unit; FP8 with rounded inputs: cuBLAS
    more      FP8 with rounded inputs: cuBLAS, in FP8; else a dense copy, which many rows pay for, and cuBLAS
"""

# Tuples of tiles grow while a kernel is compiled.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.device_limits import has_fp8
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.linear.quantized_gemv import GemvConfig, launch_gemv
from nanovllm.kernels.triton.linear.skinny_gemm import MAX_TILES, new_semaphores, sum_in_order

MAX_ROWS = 64
NUM_PROGRAMS = 264  # two for each multiprocessor of an H100
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def _load_codes(codes_ptr, place, col, i: tl.constexpr, CHUNK: tl.constexpr, IS_INT4: tl.constexpr):
    """Codes of chunk i, as bytes; `col` counts them."""
    step: tl.constexpr = CHUNK // 2 if IS_INT4 else CHUNK
    return tl.load(codes_ptr + place + i * step + col)


@triton.jit
def _as_numbers(codes, zero, dtype: tl.constexpr, IS_INT4: tl.constexpr, ZEROS: tl.constexpr):
    """[OUTPUTS, bytes] -> codes less zero [OUTPUTS, CHUNK], exact in 16 bits."""
    if IS_INT4:
        # A number with the code as its last bits, by putting them below the exponent of 1024 (or 128), less that.
        if dtype == tl.float16:
            low = ((codes & 15).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
            high = ((codes >> 4).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
            offset = tl.full([], 1032.0, tl.float16)
        else:
            low = ((codes & 15).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
            high = ((codes >> 4).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
            offset = tl.full([], 136.0, tl.bfloat16)
        if ZEROS:
            off = zero.to(dtype)[:, None] + offset
            low, high = low - off, high - off
        else:
            low, high = low - offset, high - offset
        return tl.reshape(tl.join(low, high), [codes.shape[0], codes.shape[1] * 2])
    else:
        if ZEROS:
            return (codes.to(tl.float32) - zero.to(tl.float32)[:, None]).to(dtype)
        return codes.to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_linear_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    part_ptr,
    semaphores_ptr,
    num_rows,
    num_outputs,
    x_stride,
    INPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_INT4: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    AHEAD: tl.constexpr,
    X_AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """CHUNKS: of inputs, for each program; a chunk lies in one group. GROUPS: that share no scale, 1 for one an output.

    A program has OUTPUTS outputs and one of SPLITS parts of the inputs; who is last to leave its sums adds them up.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    PER_GROUP: tl.constexpr = INPUTS // GROUPS // CHUNK  # chunks
    BYTES: tl.constexpr = CHUNK // 2 if IS_INT4 else CHUNK
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    weight_row = tl.minimum(output, num_outputs - 1)
    place = weight_row.to(tl.int64)[:, None] * (INPUTS // CHUNK * BYTES) + split * (CHUNKS * BYTES)
    col = tl.arange(0, BYTES)[None, :]
    group_place = weight_row * GROUPS
    index = tl.arange(0, ROWS)
    row = tl.minimum(index, num_rows - 1)[:, None]
    codes = ()
    scales = ()
    zeros = ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        codes = codes + (_load_codes(codes_ptr, place, col, i, CHUNK, IS_INT4),)
    for i in tl.static_range(CHUNKS):
        group = (split * CHUNKS + i) // PER_GROUP
        if GROUPS > 1 or i == 0:
            scales = scales + (tl.load(scale_ptr + group_place + group),)
        if ZEROS:
            zeros = zeros + (tl.load(zero_ptr + group_place + group),)
    if PDL:
        tl.extra.cuda.gdc_wait()

    x_offset = row * x_stride + split * (CHUNKS * CHUNK)
    x_col = tl.arange(0, CHUNK)[None, :]
    xs = ()
    for i in tl.static_range(min(X_AHEAD, CHUNKS)):
        xs = xs + (tl.load(x_ptr + x_offset + i * CHUNK + x_col),)
    acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for i in tl.static_range(CHUNKS):
        zero = None
        if ZEROS:
            zero = zeros[i]
        weights = _as_numbers(codes[i], zero, x_ptr.dtype.element_ty, IS_INT4, ZEROS)
        if GROUPS > 1:
            acc += tl.dot(weights, tl.trans(xs[i])) * scales[i][:, None]
        else:
            acc = tl.dot(weights, tl.trans(xs[i]), acc)
        # Only now are there registers for another chunk.
        if i + AHEAD < CHUNKS:
            codes = codes + (_load_codes(codes_ptr, place, col, i + AHEAD, CHUNK, IS_INT4),)
        if i + X_AHEAD < CHUNKS:
            xs = xs + (tl.load(x_ptr + x_offset + (i + X_AHEAD) * CHUNK + x_col),)
    if GROUPS == 1:
        acc = acc * scales[0][:, None]

    is_last = True
    if SPLITS > 1:
        PART: tl.constexpr = OUTPUTS * ROWS
        tile_part_ptr = part_ptr + tile * (SPLITS * PART) + tl.arange(0, OUTPUTS)[:, None] * ROWS + index[None, :]
        tl.store(tile_part_ptr + split * PART, acc)
        tl.debug_barrier()  # every warp's stores come before the one thread's release
        is_last = tl.atomic_add(semaphores_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            tl.store(semaphores_ptr + tile, 0)
            acc = sum_in_order(tile_part_ptr, SPLITS, PART)
    if is_last:
        valid = (output < num_outputs)[:, None]
        if BIAS:
            acc += tl.load(bias_ptr + output[:, None], mask=valid, other=0.0).to(tl.float32)
        result = acc.to(out_ptr.dtype.element_ty)
        tl.store(
            out_ptr + index[None, :] * num_outputs + output[:, None], result, mask=valid & (index < num_rows)[None, :]
        )


class GemmConfig(NamedTuple):
    """outputs: per program. chunk: inputs per step, in one group. splits: of the inputs, over programs.

    ahead, x_ahead: chunks of codes and of x that are held.
    """

    outputs: int
    num_warps: int
    chunk: int
    splits: int
    ahead: int
    x_ahead: int


Config = GemvConfig | GemmConfig


def choose(x: Tensor, codes: Tensor, num_groups: int) -> Config | None:
    """The kernel for x [num_rows, inputs] and codes [outputs, ..] in `num_groups` groups; None: none is made for it."""
    num_rows, num_inputs = x.shape
    if (
        not 0 < num_rows <= MAX_ROWS
        or x.dtype not in (torch.float16, torch.bfloat16)
        or x.stride(1) != 1
        or num_inputs % num_groups
        or not codes.is_contiguous()
        or (codes.dtype == torch.float8_e4m3fn and not has_fp8(codes.device))
    ):
        return None
    group_size = num_inputs // num_groups
    size = next((n for n in (128, 64, 32) if group_size % n == 0), None)
    if size is None:
        return None
    if num_rows == 1:
        return GemvConfig(size // 2 if codes.dtype == torch.uint8 else size, outputs=8, num_warps=4, ahead=4)
    return _tile_config(num_rows, codes.shape[0], num_inputs // size, size)


def _tile_config(num_rows: int, num_outputs: int, chunks: int, chunk: int) -> GemmConfig | None:
    """The rules are what sweeps over layers of an 8B model on an H100 found fastest."""
    is_narrow = num_rows <= 16 and num_outputs <= 64 * NUM_PROGRAMS
    outputs, num_warps, ahead, wanted = (128, 8, 2, 384) if is_narrow else (64, 4, 4, NUM_PROGRAMS)
    tiles = cdiv(num_outputs, outputs)
    splits = next(n for n in range(min(chunks, max(1, wanted // tiles)), chunks + 1) if chunks % n == 0)
    if tiles > MAX_TILES and splits > 1:
        return None
    return GemmConfig(outputs, num_warps, chunk, splits, ahead, x_ahead=2 if num_rows <= 16 else 1)


def quantized_linear_triton(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    config: Config,
    semaphores: Tensor | None = None,
) -> Tensor:
    """`quantized_linear.quantized_linear`, where `choose` gave a config. semaphores: `skinny_gemm.new_semaphores`'s."""
    if isinstance(config, GemvConfig):
        return launch_gemv(x, codes, scale, zero, bias, config)
    num_rows, num_inputs = x.shape
    num_outputs = codes.shape[0]
    out = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    tiles, rows = cdiv(num_outputs, config.outputs), max(8, next_power_of_2(num_rows))
    parts = None
    if config.splits > 1:
        parts = torch.empty(tiles * config.splits * config.outputs * rows, dtype=torch.float32, device=x.device)
        semaphores = new_semaphores(x.device) if semaphores is None else semaphores
    launch(
        _quantized_linear_kernel, (tiles * config.splits,), x.device,
        x, codes, scale, zero, bias, out, parts, semaphores, num_rows, num_outputs, x.stride(0), INPUTS=num_inputs,
        GROUPS=scale.shape[1], CHUNKS=num_inputs // config.chunk // config.splits, CHUNK=config.chunk,
        SPLITS=config.splits, IS_INT4=codes.dtype == torch.uint8, ZEROS=zero is not None, BIAS=bias is not None,
        ROWS=rows, OUTPUTS=config.outputs, AHEAD=config.ahead, X_AHEAD=config.x_ahead, num_warps=config.num_warps,
    )  # fmt: skip
    return out


# --- a dense copy, and inputs rounded to 8 bits --------------------------------------------------------


@triton.jit
def _dequantize_kernel(
    codes_ptr, scale_ptr, zero_ptr, out_ptr, num_inputs, num_groups, group_size,
    IS_INT4: tl.constexpr, ZEROS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    output = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < num_inputs
    if IS_INT4:
        byte = tl.load(codes_ptr + output * (num_inputs // 2) + col // 2, mask=mask, other=0).to(tl.int32)
        values = ((byte >> (col % 2 * 4)) & 15).to(tl.float32) - 8.0
    else:
        values = tl.load(codes_ptr + output * num_inputs + col, mask=mask, other=0.0).to(tl.float32)
    group = output * num_groups + col // group_size
    if ZEROS:
        values -= tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32)
    values *= tl.load(scale_ptr + group, mask=mask, other=0.0)
    tl.store(out_ptr + output * num_inputs + col, values.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_triton(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype) -> Tensor:
    """`quantized_linear.dequantize`."""
    is_int4 = codes.dtype == torch.uint8
    num_outputs, num_inputs = codes.shape[0], codes.shape[1] * (2 if is_int4 else 1)
    out = torch.empty((num_outputs, num_inputs), dtype=dtype, device=codes.device)
    launch(
        _dequantize_kernel, (num_outputs, cdiv(num_inputs, 1024)), codes.device,
        codes, scale, zero, out, num_inputs, scale.shape[1], group_size if scale.shape[1] > 1 else num_inputs,
        IS_INT4=is_int4, ZEROS=zero is not None, BLOCK=1024, num_warps=4,
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
    LARGEST: tl.constexpr = FP8_MAX if IS_FP8 else 127.0
    if GIVEN:
        scale = tl.load(given_ptr) + tl.zeros([GROUPS, 1], tl.float32)
    else:
        scale = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-12)[:, None] / LARGEST
    scaled = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    if IS_FP8:
        codes = scaled.to(tl.float8e4nv)
    else:
        codes = (scaled + 12582912.0) - 12582912.0  # to the nearest: there are no fractions beyond 2^23
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
