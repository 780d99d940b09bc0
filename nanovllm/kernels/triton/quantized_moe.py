"""Mixture of experts over codes in Triton: the grouped product of `moe.py`, which makes numbers of codes in registers.

Owns that kernel, and which products have one; that of MXFP4 is `mxfp4_experts.py`'s. Invariant: as in `moe.py`: every
(token, choice) has a row of its own, and what is read and launched depends on sizes alone. A group's scale multiplies
the float32 sum of its products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.moe import SILU, Biases, Gate, align
from nanovllm.kernels.quantized_moe import Rounded, Stack
from nanovllm.kernels.triton.common.device_limits import has_fp8
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv
from nanovllm.kernels.triton.linear.quantized_gemm import byte_numbers, split_int4
from nanovllm.kernels.triton.moe import apply_gate, choose_block_size, gate_arguments, sum_choices
from nanovllm.kernels.triton.mxfp4_experts import mxfp4_experts_triton

TILE, STEP = 64, 128  # outputs of a program; inputs at a time, at most
MAX_BLOCK = 64  # rows of a block; more of an expert's pay for dense numbers
MAX_ROWS_OF_MXFP4 = 512  # of an expert, in the mean


@triton.jit
def _multiply_codes(
    acc, codes_ptrs, scale_ptrs, zero_ptrs, first, second,
    GROUPED: tl.constexpr, IS_INT4: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """acc [TILE, BLOCK], and one step's products more. first, second: inputs [BLOCK, ..], of int4 of both halves."""
    dtype: tl.constexpr = first.dtype
    NOTHING: tl.constexpr = 1024.0 if dtype == tl.float16 else 128.0
    codes = tl.load(codes_ptrs)
    sums = tl.zeros(acc.shape, tl.float32) if GROUPED else acc
    if IS_INT4:
        off = tl.full([TILE], NOTHING + 8.0, dtype)
        if zero_ptrs is not None:
            off += tl.load(zero_ptrs).to(dtype)
        low_bits, high_bits = split_int4(codes, dtype)
        sums = tl.dot(low_bits - off[:, None], tl.trans(first), sums)
        sums = tl.dot(high_bits - off[:, None], tl.trans(second), sums)
    else:
        numbers = byte_numbers(codes, dtype)
        if zero_ptrs is not None:
            numbers = (numbers.to(tl.float32) - tl.load(zero_ptrs).to(tl.float32)[:, None]).to(dtype)
        sums = tl.dot(numbers, tl.trans(first), sums)
    return acc + sums * tl.load(scale_ptrs).to(tl.float32)[:, None] if GROUPED else sums


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_codes_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    weight_ptr,
    rows_ptr,
    block_experts_ptr,
    out_ptr,
    num_rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS_PER_X: tl.constexpr,
    GATE: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SORTED: tl.constexpr,
    IS_INT4: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """`moe._grouped_kernel`, whose `scale` is `weight` here. GROUPS: of inputs, each with a scale; steps fill them."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tiles: tl.constexpr = (OUTPUTS + TILE - 1) // TILE
    BYTES: tl.constexpr = STEP // 2 if IS_INT4 else STEP
    ROW_BYTES: tl.constexpr = INPUTS // 2 if IS_INT4 else INPUTS
    STEPS_PER_GROUP: tl.constexpr = INPUTS // GROUPS // STEP
    GROUPED: tl.constexpr = GROUPS > 1
    block = tl.program_id(0) // tiles
    expert = tl.load(block_experts_ptr + block)
    if expert < 0:
        return
    index = tl.arange(0, BLOCK)
    if SORTED:
        row = tl.load(rows_ptr + block * BLOCK + index)
    else:
        row = tl.where(index == 0, block, num_rows)
    is_row = row < num_rows
    row = tl.where(is_row, row, 0).to(tl.int64)
    output = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    GATED: tl.constexpr = GATE != ""
    planes: tl.constexpr = 2 if GATED else 1
    weight_row = expert.to(tl.int64) * (planes * OUTPUTS) + tl.minimum(output, OUTPUTS - 1)
    col = tl.arange(0, BYTES)
    x_col = col // 16 * 32 + col % 16 if IS_INT4 else col
    x_ptrs = x_ptr + (row // ROWS_PER_X)[:, None] * INPUTS + x_col[None, :]
    codes_ptrs = codes_ptr + weight_row[:, None] * ROW_BYTES + col[None, :]
    place = weight_row * GROUPS

    acc = tl.zeros([TILE, BLOCK], tl.float32)
    up = tl.zeros([TILE, BLOCK], tl.float32)
    for i in tl.range(0, INPUTS // STEP, num_stages=STAGES):
        group = place
        if GROUPED:
            group += i // STEPS_PER_GROUP
        first = tl.load(x_ptrs + i * STEP)
        second = tl.load(x_ptrs + i * STEP + 16) if IS_INT4 else first
        zero_ptrs = None if zero_ptr is None else zero_ptr + group
        acc = _multiply_codes(
            acc,
            codes_ptrs + i * BYTES,
            scale_ptr + group,
            zero_ptrs,
            first,
            second,
            GROUPED,
            IS_INT4,
            TILE,
        )
        if GATED:
            up_zero_ptrs = None if zero_ptr is None else zero_ptr + group + OUTPUTS * GROUPS
            up = _multiply_codes(
                up, codes_ptrs + i * BYTES + OUTPUTS * ROW_BYTES, scale_ptr + group + OUTPUTS * GROUPS, up_zero_ptrs,
                first, second, GROUPED, IS_INT4, TILE,
            )  # fmt: skip
    if not GROUPED:
        acc *= tl.load(scale_ptr + place).to(tl.float32)[:, None]
        if GATED:
            up *= tl.load(scale_ptr + place + OUTPUTS).to(tl.float32)[:, None]
    dtype = out_ptr.dtype.element_ty
    if GATED:
        result = apply_gate(acc, up, dtype, GATE, ALPHA, LIMIT)
    else:
        result = acc * tl.load(weight_ptr + row, mask=is_row, other=0.0)[None, :]
    mask = (output < OUTPUTS)[:, None] & is_row[None, :]
    tl.store(out_ptr + row[None, :] * OUTPUTS + output[:, None], result.to(dtype), mask=mask)


def takes(x: Tensor, gate_up: Stack, down: Stack, expert_ids: Tensor) -> bool:
    """Is a kernel for these? Steps must fill groups of inputs, and rows of an expert be few."""
    if gate_up.weight.is_e2m1 and x.dtype == torch.bfloat16:
        return expert_ids.numel() <= MAX_ROWS_OF_MXFP4 * down.num_experts
    is_few = choose_block_size(expert_ids.numel(), down.num_experts) <= MAX_BLOCK
    return is_few and x.dtype != torch.float32 and all(_step(stack) for stack in (gate_up, down))


def _step(stack: Stack) -> int:
    """Inputs at a time; 0 where none fit."""
    codes, scale, _, group_size, low = stack.weight
    num_inputs = codes.shape[1] * (2 if codes.dtype == torch.uint8 else 1)
    size = num_inputs if scale.shape[1] == 1 else group_size
    is_known = low is None and (codes.dtype != torch.float8_e4m3fn or has_fp8(codes.device))
    return next((step for step in (STEP, 64, 32) if size % step == 0 and num_inputs % size == 0), 0) if is_known else 0


def quantized_experts_triton(
    x: Tensor,
    gate_up: Stack,
    down: Stack,
    weights: Tensor,
    expert_ids: Tensor,
    rounded: Rounded | None = None,
    biases: Biases | None = None,
    gate: Gate = SILU,
) -> Tensor:
    """See `quantized_moe.quantized_experts`; for what `takes` says."""
    (num_tokens, hidden_size), top_k = x.shape, expert_ids.shape[1]
    if not num_tokens:
        return torch.empty_like(x)
    if gate_up.weight.is_e2m1:
        return mxfp4_experts_triton(x, gate_up, down, weights, expert_ids, rounded, biases, gate)
    out = torch.empty_like(x)
    rows, block_experts, block_size = None, expert_ids, 16
    if num_tokens > 1:  # the experts of one token differ: each is a block of one row already
        block_size = choose_block_size(expert_ids.numel(), down.num_experts)
        rows, block_experts = align(expert_ids, down.num_experts, block_size)
    intermediate_size = len(gate_up.weight.codes) // down.num_experts // 2
    gated, chosen = (x.new_empty(expert_ids.numel(), size) for size in (intermediate_size, hidden_size))
    if rounded is not None:
        x = rounded(x)
    assert biases is None, "experts with biases are dense, or MXFP4"
    _multiply(x, gate_up, gate, None, rows, block_experts, block_size, gated, top_k)
    if rounded is not None:
        gated = rounded(gated)
    _multiply(gated, down, None, weights, rows, block_experts, block_size, chosen, 1)
    sum_choices(chosen, out)
    return out


def _multiply(
    x: Tensor,
    stack: Stack,
    gate: Gate | None,
    weights: Tensor | None,
    rows: Tensor | None,
    block_experts: Tensor,
    block_size: int,
    out: Tensor,
    rows_per_x: int,
) -> None:
    """With a gate or with weights. rows None: block i is row i alone."""
    codes, scale, zero, _, _ = stack.weight
    num_rows, num_outputs = out.shape
    launch(
        _grouped_codes_kernel, (block_experts.numel() * cdiv(num_outputs, TILE),), x.device,
        x, codes, scale, zero, weights, rows, block_experts, out, num_rows,
        INPUTS=x.shape[1], OUTPUTS=num_outputs, GROUPS=scale.shape[1], ROWS_PER_X=rows_per_x, **gate_arguments(gate),
        SORTED=rows is not None, IS_INT4=codes.dtype == torch.uint8, BLOCK=block_size, TILE=TILE,
        STEP=_step(stack), STAGES=3, num_warps=4,
    )  # fmt: skip
