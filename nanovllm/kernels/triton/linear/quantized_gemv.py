"""The product of a row with quantized weights, by multiplying and adding in registers.

Owns that kernel; which products it is for is `quantized_linear.py`'s to say. A lane has 16 bytes of codes that
lie side by side, four lanes (or eight) a group of inputs. Codes become float32 by putting them below a constant
exponent, one or two instructions each; what that adds to every code is taken off the group's sum. Codes of four bits
are loaded as words of eight, and inputs four at a time, so that neither is taken apart into bytes and put together
again.
Invariant: a row's sums are added in an order that the sizes alone determine.
"""

# Tuples of tiles grow while a kernel is compiled.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv

ROW_BYTES = 512  # of an output's codes, in a chunk


@triton.jit
def _load_codes(
    codes_ptr, offset, group, i: tl.constexpr, GROUPS: tl.constexpr, PER_CHUNK: tl.constexpr, UNITS: tl.constexpr
):
    """Chunk i of the rows at `offset`: [OUTPUTS, PER_CHUNK, UNITS]."""
    place = offset + i * (PER_CHUNK * UNITS)
    if (i + 1) * PER_CHUNK <= GROUPS:
        return tl.load(codes_ptr + place)
    else:
        return tl.load(codes_ptr + place, mask=(group + i * PER_CHUNK < GROUPS)[None, :, None], other=0.0)


@triton.jit
def _one_of_four(inputs, j: tl.constexpr, dtype: tl.constexpr):
    """Of four 16-bit numbers in an int64, number j, as float32."""
    pair = (inputs >> 32 if j >= 2 else inputs).to(tl.int32)
    if dtype == tl.float16:
        return ((pair >> (j % 2 * 16)) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (pair & -65536 if j % 2 else pair << 16).to(tl.float32, bitcast=True)


# Byte j of $8 goes to bits 12 to 19, where its halves are the integers below the exponents of 2048 and of 128: $2j and
# $2j + 1. "lop3" with 0xea is (first & second) | third.
_MOVES = ("shl.b32 t, $8, 12;", "shl.b32 t, $8, 4;", "shr.b32 t, $8, 4;", "shr.b32 t, $8, 12;")
_SPLIT = tl.constexpr(
    "{.reg .b32 t, m, n, c, d; mov.b32 m, 0xf000; mov.b32 n, 0xf0000; mov.b32 c, 0x45000000; mov.b32 d, 0x43000000;"
    + "".join(
        f"{move} lop3.b32 ${2 * j}, t, m, c, 0xea; lop3.b32 ${2 * j + 1}, t, n, d, 0xea;"
        for j, move in enumerate(_MOVES)
    )
    + "}"
)


@triton.jit
def split_words(words):
    """Words of eight codes of four bits -> of each byte in turn, the lower half and 2048, the upper half and 128."""
    return tl.inline_asm_elementwise(
        _SPLIT, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [words],
        dtype=(
            tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32,
        ),
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _add_words(words, first, second, dtype: tl.constexpr):
    """Words [OUTPUTS, PER_CHUNK, UNITS] of eight codes times inputs [PER_CHUNK, UNITS], four each for the lower and the
    upper halves of their bytes: the sums [OUTPUTS, PER_CHUNK], and those of the inputs [1, PER_CHUNK]."""
    low0, high0, low1, high1, low2, high2, low3, high3 = split_words(words)
    a, b = tl.broadcast_to(first[None, :, :], words.shape), tl.broadcast_to(second[None, :, :], words.shape)
    products = low0 * _one_of_four(a, 0, dtype)
    products += high0 * _one_of_four(b, 0, dtype)
    products += low1 * _one_of_four(a, 1, dtype)
    products += high1 * _one_of_four(b, 1, dtype)
    products += low2 * _one_of_four(a, 2, dtype)
    products += high2 * _one_of_four(b, 2, dtype)
    products += low3 * _one_of_four(a, 3, dtype)
    products += high3 * _one_of_four(b, 3, dtype)
    sum_a = tl.zeros(first.shape, tl.float32)
    sum_b = tl.zeros(first.shape, tl.float32)
    for j in tl.static_range(4):
        sum_a += _one_of_four(first, j, dtype)
        sum_b += _one_of_four(second, j, dtype)
    too_much = tl.sum(2048.0 * sum_a + 128.0 * sum_b, axis=1)[None, :]
    return tl.sum(products, axis=2) - too_much, tl.sum(sum_a + sum_b, axis=1)[None, :]


@triton.jit(do_not_specialize=["num_outputs"])
def _quantized_vector_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    low_ptr,
    bias_ptr,
    out_ptr,
    num_outputs,
    GROUPS: tl.constexpr,
    SCALES: tl.constexpr,
    UNITS: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    IS_INT4: tl.constexpr,
    IS_FP8: tl.constexpr,
    OUTPUTS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """GROUPS: of UNITS bytes, or words of "int4", in which sums are made; of SCALES scales an output each has one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: tl.constexpr = (GROUPS + PER_CHUNK - 1) // PER_CHUNK
    # What a code has too much: of int4, where there is no `low`.
    OFFSET: tl.constexpr = (8.0 if low_ptr is None else 0.0) if IS_INT4 else (0.0 if IS_FP8 else 32896.0)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    weight_row = tl.minimum(output, num_outputs - 1)
    group = tl.arange(0, PER_CHUNK)
    in_chunk = group[:, None] * UNITS + tl.arange(0, UNITS)[None, :]
    offset = weight_row.to(tl.int64)[:, None, None] * (GROUPS * UNITS) + in_chunk[None, :, :]
    codes = ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        codes = codes + (_load_codes(codes_ptr, offset, group, i, GROUPS, PER_CHUNK, UNITS),)
    if PDL:
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros([OUTPUTS, PER_CHUNK], tl.float32)
    for i in tl.static_range(CHUNKS):
        own = group + i * PER_CHUNK
        scale_place = weight_row[:, None] * SCALES + tl.minimum(own, GROUPS - 1)[None, :] // (GROUPS // SCALES)
        if SCALES > 1:
            scale = tl.load(scale_ptr + scale_place).to(tl.float32)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + scale_place).to(tl.float32)
        place = i * (PER_CHUNK * UNITS) + in_chunk
        mask = (own < GROUPS)[:, None]
        if IS_INT4:
            four_ptr = x_ptr.to(tl.pointer_type(tl.int64)) + place // 4 * 8 + place % 4
            first, second = tl.load(four_ptr, mask=mask, other=0), tl.load(four_ptr + 4, mask=mask, other=0)
            products, total = _add_words(codes[i], first, second, x_ptr.dtype.element_ty)
        else:
            if IS_FP8:
                numbers = codes[i].to(tl.float32)
            else:
                bits = codes[i].to(tl.uint8, bitcast=True).to(tl.uint32) ^ 128
                numbers = ((bits << 8) | 0x47000000).to(tl.float32, bitcast=True)  # 32768, 128 and the code
            x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
            products = tl.sum(numbers * x[None, :, :], axis=2)
            total = tl.sum(x, axis=1)[None, :]
        if zero_ptr is not None:
            products -= (zero + OFFSET) * total
        elif OFFSET > 0:
            products -= OFFSET * total
        if SCALES > 1:
            products *= scale
        if low_ptr is not None:
            products += tl.load(low_ptr + scale_place).to(tl.float32) * total
        acc += products
        # Only now are there registers for another chunk.
        if i + AHEAD < CHUNKS:
            codes = codes + (_load_codes(codes_ptr, offset, group, i + AHEAD, GROUPS, PER_CHUNK, UNITS),)
    valid = output < num_outputs
    result = tl.sum(acc, axis=1)
    if SCALES == 1:
        result *= tl.load(scale_ptr + weight_row).to(tl.float32)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + output, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=valid)


class GemvConfig(NamedTuple):
    """group_bytes: of codes whose products are added first. outputs: per program. ahead: chunks of codes held."""

    group_bytes: int
    outputs: int
    num_warps: int
    ahead: int


def launch_gemv(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    low: Tensor | None,
    bias: Tensor | None,
    config: GemvConfig,
) -> Tensor:
    """`quantized_linear.quantized_linear` of one row."""
    num_outputs, is_int4 = codes.shape[0], codes.dtype == torch.uint8
    unit_bytes = 4 if is_int4 else 1
    out = torch.empty((1, num_outputs), dtype=x.dtype, device=x.device)
    launch(
        _quantized_vector_kernel, (cdiv(num_outputs, config.outputs),), x.device,
        x, codes.view(torch.int32) if is_int4 else codes, scale, zero, low, bias, out, num_outputs,
        GROUPS=codes.shape[1] // config.group_bytes, SCALES=scale.shape[1], UNITS=config.group_bytes // unit_bytes,
        PER_CHUNK=ROW_BYTES // config.group_bytes, IS_INT4=is_int4, IS_FP8=codes.dtype == torch.float8_e4m3fn,
        OUTPUTS=config.outputs, AHEAD=config.ahead,
        num_warps=config.num_warps,
    )  # fmt: skip
    return out
