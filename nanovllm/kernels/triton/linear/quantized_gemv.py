"""The product of a row with quantized weights, by multiplying and adding in registers.

Owns that kernel; which products it is for is `quantized_linear.py`'s to say. A lane has 16 bytes of codes that
lie side by side, four lanes (or eight) a group of inputs. Codes become float32 by putting them below a constant
exponent, two instructions each; what that adds to every code is taken off the group's sum. Invariant: a row's sums are
added in an order that the sizes alone determine.
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
    codes_ptr, offset, group, i: tl.constexpr, GROUPS: tl.constexpr, PER_CHUNK: tl.constexpr, BYTES: tl.constexpr
):
    """Chunk i of the rows at `offset`: [OUTPUTS, PER_CHUNK, BYTES]."""
    place = offset + i * (PER_CHUNK * BYTES)
    if (i + 1) * PER_CHUNK <= GROUPS:
        return tl.load(codes_ptr + place)
    else:
        return tl.load(codes_ptr + place, mask=(group + i * PER_CHUNK < GROUPS)[None, :, None], other=0.0)


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
    BYTES: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    IS_INT4: tl.constexpr,
    IS_FP8: tl.constexpr,
    OUTPUTS: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """GROUPS: of BYTES bytes of codes, the unit in which sums are made; of SCALES scales an output each has one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    CHUNKS: tl.constexpr = (GROUPS + PER_CHUNK - 1) // PER_CHUNK
    # What a code has too much: of int4, 8 more where there is no `low`.
    OFFSET: tl.constexpr = (136.0 if low_ptr is None else 128.0) if IS_INT4 else (0.0 if IS_FP8 else 32896.0)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    weight_row = tl.minimum(output, num_outputs - 1)
    group, byte = tl.arange(0, PER_CHUNK), tl.arange(0, BYTES)
    in_chunk = group[:, None] * BYTES + byte[None, :]
    offset = weight_row.to(tl.int64)[:, None, None] * (GROUPS * BYTES) + in_chunk[None, :, :]
    codes = ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        codes = codes + (_load_codes(codes_ptr, offset, group, i, GROUPS, PER_CHUNK, BYTES),)
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
        if IS_INT4:
            bits = codes[i].to(tl.uint32)
            low = (((bits & 15) << 16) | 0x43000000).to(tl.float32, bitcast=True)  # 128 and the code
            high = (((bits & 240) << 12) | 0x43000000).to(tl.float32, bitcast=True)
        elif IS_FP8:
            low = codes[i].to(tl.float32)
        else:
            bits = codes[i].to(tl.uint8, bitcast=True).to(tl.uint32) ^ 128
            low = ((bits << 8) | 0x47000000).to(tl.float32, bitcast=True)  # 32768, 128 and the code
        place = i * (PER_CHUNK * BYTES) + in_chunk
        mask = (own < GROUPS)[:, None]
        if IS_INT4:
            x_place = place // 16 * 32 + place % 16
            first = tl.load(x_ptr + x_place, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(x_ptr + x_place + 16, mask=mask, other=0.0).to(tl.float32)
            products = tl.sum(low * first[None, :, :] + high * second[None, :, :], axis=2)
            total = tl.sum(first + second, axis=1)
        else:
            x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
            products = tl.sum(low * x[None, :, :], axis=2)
            total = tl.sum(x, axis=1)
        if zero_ptr is not None:
            products -= (zero + OFFSET) * total[None, :]
        elif not IS_FP8:
            products -= OFFSET * total[None, :]
        if SCALES > 1:
            products *= scale
        if low_ptr is not None:
            products += tl.load(low_ptr + scale_place).to(tl.float32) * total[None, :]
        acc += products
        # Only now are there registers for another chunk.
        if i + AHEAD < CHUNKS:
            codes = codes + (_load_codes(codes_ptr, offset, group, i + AHEAD, GROUPS, PER_CHUNK, BYTES),)
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
    num_outputs = codes.shape[0]
    out = torch.empty((1, num_outputs), dtype=x.dtype, device=x.device)
    launch(
        _quantized_vector_kernel, (cdiv(num_outputs, config.outputs),), x.device,
        x, codes, scale, zero, low, bias, out, num_outputs, GROUPS=codes.shape[1] // config.group_bytes,
        SCALES=scale.shape[1], BYTES=config.group_bytes, PER_CHUNK=ROW_BYTES // config.group_bytes,
        IS_INT4=codes.dtype == torch.uint8, IS_FP8=codes.dtype == torch.float8_e4m3fn,
        OUTPUTS=config.outputs, AHEAD=config.ahead,
        num_warps=config.num_warps,
    )  # fmt: skip
    return out
