"""Experts in MXFP4 on a GPU: grouped products that make numbers of codes in registers, with a few operations for eight.

Owns both products of a layer's experts, for any number of tokens. Making numbers is most of the work of few tokens, so
it takes less than four instructions for each; and what a step needs, scales too, is asked for some steps before, so it
is best if the scales of a group of inputs, for a tile of outputs, lie side by side. One token's second products come
with their sum, its choices being the columns of one small product. Invariant: as in `moe.py`: every (token, choice) has
a row of its own, and the order of every sum follows from the sizes and from which output it is.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.moe import Biases, Gate, align
from nanovllm.kernels.quantized_moe import Rounded, Stack
from nanovllm.kernels.triton.common.device_limits import has_warp_groups
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.linear.quantized_gemm import e2m1_numbers, e8m0_numbers
from nanovllm.kernels.triton.moe import apply_gate, choose_block_size, gate_arguments, sum_choices

GROUP = tl.constexpr(32)  # inputs that share a scale
SCALED_BACK = tl.constexpr(2.0**63)  # of `scaled_numbers`


def _scaled_numbers(pairs: int) -> tuple[str, str]:
    """Assembly, and what its operands are: pairs of numbers of the lower halves of bytes, then of the upper ones; the
    bytes; their scale, once for each of them.

    A half with its sign at bit 15 and the rest at bits 8 to 6, which a product with the sum of two powers of 2 and a
    mask make of it, is 2^-126 of what it stands for; multiplying by 2^63 times the scale does both.
    """
    codes, scale = 2 * pairs, 2 * pairs + 1
    lines = [
        ".reg .b32 factor, nothing, low, high",
        "mov.b32 nothing, 0x80008000",
        f"mad.lo.u32 factor, ${scale}, 0x00800080, 0x1f801f80",
    ]
    for pair in range(pairs):
        lines += [
            f"prmt.b32 low, ${codes}, 0, 0x4{2 * pair + 1}4{2 * pair}",
            "and.b32 high, low, 0x00f000f0",
            "and.b32 low, low, 0x000f000f",
            "mul.lo.u32 low, low, 0x1040",
            "mul.lo.u32 high, high, 0x104",
            "and.b32 low, low, 0x81c081c0",
            "and.b32 high, high, 0x81c081c0",
            f"fma.rn.bf16x2 ${pair}, low, factor, nothing",
            f"fma.rn.bf16x2 ${pairs + pair}, high, factor, nothing",
        ]
    return "{" + "; ".join(lines) + ";}", ",".join(["=&r"] * 2 * pairs + ["r"] * (1 + 2 * pairs))


_ASM_OF_2, _OPERANDS_OF_2 = (tl.constexpr(text) for text in _scaled_numbers(1))
_ASM_OF_4, _OPERANDS_OF_4 = (tl.constexpr(text) for text in _scaled_numbers(2))


class Config(NamedTuple):
    """rows: of weights, per program. step: inputs at a time. stages: steps whose codes and inputs are on their way."""

    rows: int
    step: int
    num_warps: int
    stages: int


MAX_BLOCK = 64
# By rows of a block: the product, and the gated one, a program of which has half as many outputs as rows.
CONFIGS = {
    8: (Config(64, 256, 4, 3), Config(64, 256, 4, 3)),
    16: (Config(64, 256, 4, 3), Config(128, 128, 4, 3)),
    32: (Config(64, 256, 4, 3), Config(128, 128, 4, 3)),
    64: (Config(128, 128, 4, 3), Config(128, 64, 4, 4)),
}
SUMMED = Config(64, 256, 4, 3)  # of one token's second products


@triton.jit
def scaled_numbers(codes, scale, WARP_GROUPS: tl.constexpr):
    """Of codes, two in a byte, the numbers of the lower and of the upper halves times scale (int32, of equal shape)
    times 2^-63: bfloat16, exact. WARP_GROUPS: four warps multiply together, and a thread has two bytes side by side;
    else four. They have one scale."""
    if WARP_GROUPS:
        return tl.inline_asm_elementwise(
            _ASM_OF_2, _OPERANDS_OF_2, [codes, scale], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            _ASM_OF_4, _OPERANDS_OF_4, [codes, scale], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )


@triton.jit
def _add_products(
    low_sums, high_sums, codes, scale, first, second,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, WARP_GROUPS: tl.constexpr,
):  # fmt: skip
    """The sums of lower and of upper halves [ROWS, columns], apart as each waits for the one before, and products of
    codes [ROWS, GROUPS * 16] and inputs [columns, GROUPS * 16] more.

    scale [GROUPS, ROWS]. first, second: the inputs of lower and of upper halves; in float16, whose range has no room
    for scales, of one group.
    """
    dtype: tl.constexpr = first.dtype
    if dtype == tl.float16:
        factor = e8m0_numbers(tl.reshape(scale, [ROWS]))[:, None]
        low_sums += factor * tl.dot(e2m1_numbers(codes & 15, dtype), tl.trans(first))
        high_sums += factor * tl.dot(e2m1_numbers(codes >> 4, dtype), tl.trans(second))
        return low_sums, high_sums
    else:
        by_row = tl.trans(scale).to(tl.int32)
        by_code = tl.reshape(tl.broadcast_to(by_row[:, :, None], [ROWS, GROUPS, 16]), [ROWS, GROUPS * 16])
        low, high = scaled_numbers(codes, by_code, WARP_GROUPS)
        low_sums = tl.dot(low, tl.trans(first), low_sums)
        if WARP_GROUPS:
            return tl.dot(high, tl.trans(second), low_sums), high_sums
        else:
            return low_sums, tl.dot(high, tl.trans(second), high_sums)


@triton.jit(do_not_specialize=["num_rows"])
def _experts_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    rows_ptr,
    block_experts_ptr,
    out_ptr,
    num_rows,
    scale_stride_row,
    scale_stride_group,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS_PER_X: tl.constexpr,
    GATE: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SORTED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    WARP_GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """`moe._grouped_kernel`, whose `scale` is `weight` here. Gates and their ups, TILE of both, are one product."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tiles: tl.constexpr = (OUTPUTS + TILE - 1) // TILE
    block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
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
    GATED: tl.constexpr = GATE != ""
    planes: tl.constexpr = 2 if GATED else 1
    ROWS: tl.constexpr = planes * TILE
    BYTES: tl.constexpr = STEP // 2
    GROUPS: tl.constexpr = STEP // GROUP
    first_output = tile * TILE
    place = tl.arange(0, ROWS)
    is_output = first_output + place % TILE < OUTPUTS
    weight_row = expert.to(tl.int64) * (planes * OUTPUTS) + first_output + place // TILE * OUTPUTS + place % TILE
    byte, group = tl.arange(0, BYTES), tl.arange(0, GROUPS)
    x_ptrs = x_ptr + (row // ROWS_PER_X)[:, None] * INPUTS + (byte // 16 * 32 + byte % 16)[None, :]
    codes_ptrs = codes_ptr + weight_row[:, None] * (INPUTS // 2) + byte[None, :]
    scale_ptrs = scale_ptr + group[:, None] * scale_stride_group + weight_row[None, :] * scale_stride_row

    low_sums, high_sums = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    STEPS: tl.constexpr = (INPUTS + STEP - 1) // STEP
    for turn in tl.range(0, STEPS, num_stages=STAGES):
        i = (turn + tile) % STEPS  # else all programs ask for the same inputs at a time
        is_byte = byte < INPUTS // 2 - i * BYTES
        is_group = group < INPUTS // GROUP - i * GROUPS
        x_mask = is_row[:, None] & is_byte[None, :]
        first = tl.load(x_ptrs + i * STEP, mask=x_mask, other=0.0)
        second = tl.load(x_ptrs + i * STEP + 16, mask=x_mask, other=0.0)
        codes = tl.load(codes_ptrs + i * BYTES, mask=is_output[:, None] & is_byte[None, :], other=0)
        scale_mask = is_group[:, None] & is_output[None, :]
        scale = tl.load(scale_ptrs + i * GROUPS * scale_stride_group, mask=scale_mask, other=0)
        low_sums, high_sums = _add_products(
            low_sums, high_sums, codes, scale, first, second, ROWS, GROUPS, WARP_GROUPS
        )  # fmt: skip
    acc = low_sums + high_sums
    if x_ptr.dtype.element_ty == tl.bfloat16:
        acc *= SCALED_BACK
    dtype = out_ptr.dtype.element_ty
    output = first_output + tl.arange(0, TILE)
    mask = (output < OUTPUTS)[:, None] & is_row[None, :]
    bias_ptrs = bias_ptr
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * (planes * OUTPUTS) + tl.minimum(output, OUTPUTS - 1)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [2, TILE, BLOCK]), (1, 2, 0)))
        if bias_ptr is not None:
            gate += tl.load(bias_ptrs).to(tl.float32)
            up += tl.load(bias_ptrs + OUTPUTS).to(tl.float32)
        result = apply_gate(gate, up, dtype, GATE, ALPHA, LIMIT)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptrs).to(tl.float32)
        result = acc * tl.load(weight_ptr + row, mask=is_row, other=0.0)[None, :]
    tl.store(out_ptr + row[None, :] * OUTPUTS + output[:, None], result.to(dtype), mask=mask)


@triton.jit
def _summed_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    experts_ptr,
    out_ptr,
    scale_stride_row,
    scale_stride_group,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    WARP_GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [OUTPUTS] = the sum over a token's choices of weight[choice] times that expert's weight times x[choice].

    A program's rows of weights are TILE of each choice's expert, its columns all choices; those of other experts are
    multiplied for nothing.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    choice, column = tl.arange(0, TOP_K_PADDED), tl.arange(0, COLUMNS)
    is_choice, is_column = choice < TOP_K, column < TOP_K
    expert = tl.load(experts_ptr + choice, mask=is_choice, other=0)
    output = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_output = output < OUTPUTS
    ROWS: tl.constexpr = TOP_K_PADDED * TILE
    BYTES: tl.constexpr = STEP // 2
    GROUPS: tl.constexpr = STEP // GROUP
    is_row = is_choice[:, None] & is_output[None, :]
    weight_row = expert.to(tl.int64)[:, None] * OUTPUTS + output[None, :]
    byte, group = tl.arange(0, BYTES), tl.arange(0, GROUPS)
    x_ptrs = x_ptr + column[:, None] * INPUTS + (byte // 16 * 32 + byte % 16)[None, :]
    codes_ptrs = codes_ptr + weight_row[:, :, None] * (INPUTS // 2) + byte[None, None, :]
    scale_ptrs = scale_ptr + group[:, None, None] * scale_stride_group + weight_row[None, :, :] * scale_stride_row

    low_sums, high_sums = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    STEPS: tl.constexpr = (INPUTS + STEP - 1) // STEP
    for turn in tl.range(0, STEPS, num_stages=STAGES):
        i = (turn + tl.program_id(0)) % STEPS  # else all programs ask for the same inputs at a time
        is_byte = byte < INPUTS // 2 - i * BYTES
        is_group = group < INPUTS // GROUP - i * GROUPS
        x_mask = is_column[:, None] & is_byte[None, :]
        first = tl.load(x_ptrs + i * STEP, mask=x_mask, other=0.0)
        second = tl.load(x_ptrs + i * STEP + 16, mask=x_mask, other=0.0)
        codes = tl.load(codes_ptrs + i * BYTES, mask=is_row[:, :, None] & is_byte[None, None, :], other=0)
        scale_mask = is_group[:, None, None] & is_row[None, :, :]
        scale = tl.load(scale_ptrs + i * GROUPS * scale_stride_group, mask=scale_mask, other=0)
        codes, scale = tl.reshape(codes, [ROWS, BYTES]), tl.reshape(scale, [GROUPS, ROWS])
        low_sums, high_sums = _add_products(
            low_sums, high_sums, codes, scale, first, second, ROWS, GROUPS, WARP_GROUPS
        )  # fmt: skip
    acc = low_sums + high_sums
    is_own = choice[:, None, None] == column[None, None, :]
    result = tl.sum(tl.where(is_own, tl.reshape(acc, [TOP_K_PADDED, TILE, COLUMNS]), 0.0), axis=2)
    if x_ptr.dtype.element_ty == tl.bfloat16:
        result *= SCALED_BACK
    if bias_ptr is not None:
        result += tl.load(bias_ptr + expert[:, None] * OUTPUTS + output[None, :], mask=is_row, other=0.0).to(tl.float32)
    result *= tl.load(weight_ptr + choice, mask=is_choice, other=0.0)[:, None]
    dtype = out_ptr.dtype.element_ty
    total = tl.sum(result.to(dtype).to(tl.float32), axis=0)  # each rounded, as if it had a row
    tl.store(out_ptr + output, total.to(dtype), mask=is_output)


def mxfp4_experts_triton(
    x: Tensor,
    gate_up: Stack,
    down: Stack,
    weights: Tensor,
    expert_ids: Tensor,
    rounded: Rounded | None,
    biases: Biases | None,
    gate: Gate,
) -> Tensor:
    """`quantized_moe.quantized_experts` of at least one token, in bfloat16 or float16."""
    num_tokens, top_k = expert_ids.shape
    out = torch.empty_like(x)
    if rounded is not None:
        x = rounded(x)
    rows, block_experts, block_size = None, expert_ids, 8
    if num_tokens > 1:  # the experts of one token differ: each is a block of one row already
        block_size = min(choose_block_size(expert_ids.numel(), down.num_experts), MAX_BLOCK)
        rows, block_experts = align(expert_ids, down.num_experts, block_size)
    gate_up_bias, down_bias = (None, None) if biases is None else biases
    gated = x.new_empty(expert_ids.numel(), len(gate_up.weight.codes) // gate_up.num_experts // 2)
    _multiply(x, gate_up, gate_up_bias, gate, None, rows, block_experts, block_size, gated, top_k)
    if rounded is not None:
        gated = rounded(gated)
    if num_tokens == 1:
        _multiply_and_sum(gated, down, down_bias, weights, expert_ids, out)
        return out
    chosen = x.new_empty(expert_ids.numel(), x.shape[1])
    _multiply(gated, down, down_bias, None, weights, rows, block_experts, block_size, chosen, 1)
    sum_choices(chosen, out)
    return out


def _multiply(
    x: Tensor,
    stack: Stack,
    bias: Tensor | None,
    gate: Gate | None,
    weights: Tensor | None,
    rows: Tensor | None,
    block_experts: Tensor,
    block_size: int,
    out: Tensor,
    rows_per_x: int,
) -> None:
    """With a gate or with weights. rows None: block i is row i alone."""
    codes, scale, _, _, _ = stack.weight
    num_rows, num_outputs = out.shape
    config = CONFIGS[block_size][gate is not None]
    tile = config.rows // (1 if gate is None else 2)
    launch(
        _experts_kernel, (block_experts.numel() * cdiv(num_outputs, tile),), x.device,
        x, codes, scale, bias, weights, rows, block_experts, out, num_rows, *scale.stride(),
        INPUTS=x.shape[1], OUTPUTS=num_outputs, ROWS_PER_X=rows_per_x, **gate_arguments(gate),
        SORTED=rows is not None, BLOCK=block_size, TILE=tile, STEP=_step(config, x), STAGES=config.stages,
        WARP_GROUPS=block_size > 8 and has_warp_groups(x.device), num_warps=config.num_warps,
    )  # fmt: skip


def _multiply_and_sum(
    x: Tensor, stack: Stack, bias: Tensor | None, weights: Tensor, expert_ids: Tensor, out: Tensor
) -> None:
    codes, scale, _, _, _ = stack.weight
    top_k = expert_ids.numel()
    padded = next_power_of_2(top_k)
    tile = max(1, SUMMED.rows // padded)
    launch(
        _summed_kernel, (cdiv(out.numel(), tile),), x.device,
        x, codes, scale, bias, weights, expert_ids, out, *scale.stride(),
        INPUTS=x.shape[1], OUTPUTS=out.numel(), TOP_K=top_k, TOP_K_PADDED=padded, COLUMNS=max(8, padded),
        TILE=tile, STEP=_step(SUMMED, x), STAGES=SUMMED.stages, WARP_GROUPS=False,
        num_warps=SUMMED.num_warps,
    )  # fmt: skip


def _step(config: Config, x: Tensor) -> int:
    return config.step if x.dtype == torch.bfloat16 else 32
