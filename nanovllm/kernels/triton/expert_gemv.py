"""One token through its experts in MXFP4, by multiplying and adding in registers.

Owns the kernel for a single token, whose experts are a vector each; more tokens are `quantized_moe.py`'s. A lane has
the 16 bytes of a group of 32 inputs, and all that a program needs of its weights is asked for before any of it is used.
Invariant: a sum's order follows from the sizes alone.
"""

# Tuples of tiles grow while a kernel is compiled.
# mypy: disable-error-code="assignment, misc, var-annotated, no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.moe import Gate
from nanovllm.kernels.quantized_moe import Stack
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv
from nanovllm.kernels.triton.moe import apply_gate, gate_arguments

OUTPUTS = 8  # of a program
PER_CHUNK = 32  # groups whose codes a tile holds


@triton.jit
def _load_codes(codes_ptr, offset, group, i: tl.constexpr, GROUPS: tl.constexpr, PER_CHUNK: tl.constexpr):
    """Chunk i of the rows at `offset`: [OUTPUTS, PER_CHUNK, 16]."""
    place = offset + i * (PER_CHUNK * 16)
    if (i + 1) * PER_CHUNK <= GROUPS:
        return tl.load(codes_ptr + place)
    else:
        return tl.load(codes_ptr + place, mask=(group + i * PER_CHUNK < GROUPS)[None, :, None], other=0)


@triton.jit
def _add_products(acc, codes, scale_ptrs, first, second, is_group):
    """acc [OUTPUTS, PER_CHUNK], and the products of one chunk more. Numbers are 2^-14 of what the codes stand for, so
    that float16 has them; the scales make up for it."""
    bits = codes.to(tl.uint16)
    low = (((bits & 7) << 9) | ((bits & 8) << 12)).to(tl.float16, bitcast=True).to(tl.float32)
    high = (((bits & 112) << 5) | ((bits & 128) << 8)).to(tl.float16, bitcast=True).to(tl.float32)
    products = tl.sum(low * first[None, :, :] + high * second[None, :, :], axis=2)
    exponent = tl.load(scale_ptrs, mask=is_group[None, :], other=0).to(tl.uint32) + 14
    return acc + products * (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _expert_vector_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    experts_ptr,
    out_ptr,
    ROWS_PER_X: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    GATE: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[choice] [SIZE] = that expert's weight times x[choice // ROWS_PER_X], with a gate or times weight[choice]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tiles: tl.constexpr = (SIZE + OUTPUTS - 1) // OUTPUTS
    CHUNKS: tl.constexpr = (GROUPS + PER_CHUNK - 1) // PER_CHUNK
    GATED: tl.constexpr = GATE != ""
    choice = tl.program_id(0) // tiles
    expert = tl.load(experts_ptr + choice)
    output = tl.program_id(0) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    planes: tl.constexpr = 2 if GATED else 1
    row = expert.to(tl.int64) * (planes * SIZE) + tl.minimum(output, SIZE - 1)
    group, byte = tl.arange(0, PER_CHUNK), tl.arange(0, 16)
    offset = row[:, None, None] * (GROUPS * 16) + group[None, :, None] * 16 + byte[None, None, :]
    codes, up_codes = (), ()
    for i in tl.static_range(CHUNKS):
        codes = codes + (_load_codes(codes_ptr, offset, group, i, GROUPS, PER_CHUNK),)
        if GATED:
            up_codes = up_codes + (_load_codes(codes_ptr + SIZE * GROUPS * 16, offset, group, i, GROUPS, PER_CHUNK),)
    scale_ptrs = scale_ptr + row[:, None] * GROUPS + group[None, :]
    x_ptrs = x_ptr + choice // ROWS_PER_X * (GROUPS * 32) + group[:, None] * 32 + byte[None, :]
    acc = tl.zeros([OUTPUTS, PER_CHUNK], tl.float32)
    up = tl.zeros([OUTPUTS, PER_CHUNK], tl.float32)
    for i in tl.static_range(CHUNKS):
        is_group = group + i * PER_CHUNK < GROUPS
        first = tl.load(x_ptrs + i * (PER_CHUNK * 32), mask=is_group[:, None], other=0.0).to(tl.float32)
        second = tl.load(x_ptrs + i * (PER_CHUNK * 32) + 16, mask=is_group[:, None], other=0.0).to(tl.float32)
        acc = _add_products(acc, codes[i], scale_ptrs + i * PER_CHUNK, first, second, is_group)
        if GATED:
            up_ptrs = scale_ptrs + SIZE * GROUPS + i * PER_CHUNK
            up = _add_products(up, up_codes[i], up_ptrs, first, second, is_group)
    dtype = out_ptr.dtype.element_ty
    result, up_result = tl.sum(acc, axis=1), tl.sum(up, axis=1)
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * (planes * SIZE) + tl.minimum(output, SIZE - 1)
        result += tl.load(bias_ptrs).to(tl.float32)
        if GATED:
            up_result += tl.load(bias_ptrs + SIZE).to(tl.float32)
    if GATED:
        result = apply_gate(result, up_result, dtype, GATE, ALPHA, LIMIT)
    else:
        result *= tl.load(weight_ptr + choice)
    tl.store(out_ptr + choice * SIZE + output, result.to(dtype), mask=output < SIZE)


def multiply_vectors(
    x: Tensor,
    stack: Stack,
    bias: Tensor | None,
    gate: Gate | None,
    weights: Tensor | None,
    expert_ids: Tensor,
    out: Tensor,
    rows_per_x: int,
) -> None:
    """Writes out [choices, outputs], of one token's choices of experts; with a gate or with weights."""
    codes, scale, _, _, _ = stack.weight
    num_choices, size = out.shape
    launch(
        _expert_vector_kernel, (num_choices * cdiv(size, OUTPUTS),), x.device,
        x, codes, scale, bias, weights, expert_ids, out, ROWS_PER_X=rows_per_x, GROUPS=scale.shape[1], SIZE=size,
        **gate_arguments(gate), OUTPUTS=OUTPUTS, PER_CHUNK=PER_CHUNK, num_warps=4,
    )  # fmt: skip
