"""Mixture of experts in Triton: alignment by expert, and a grouped GEMM in which each block of rows has its expert.

Owns how experts run on a GPU; a single token is `expert_vectors.py`'s. Few tokens: the products read weights and little
else, so blocks are as small as the matrix unit allows (16 rows), and programs many, each with several chunks of its
weights on the way. Many tokens: blocks of 64 or 128 rows, an ordinary tiled product. Invariant: every (token, choice)
has a row of its own, which one program writes; what is read and launched depends on sizes alone, so all of it can be
captured as a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.moe import SILU, Biases, Gate, align, num_blocks
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2

MAX_ROWS_OF_ALIGN = 4096  # every program of the kernel looks at all rows; more are sorted by PyTorch
SUM_BLOCK = 1024


@dataclass(frozen=True)
class GroupedConfig:
    """tile: outputs per program. chunk: bytes of each weight row per step. num_stages: chunks on the way, at most."""

    tile: int
    chunk: int
    num_warps: int
    num_stages: int


# Rows of an expert in the mean, and the rows of a block, such that they mostly fill one, and it fills the matrix unit.
BLOCK_SIZES = [(12, 16), (24, 32), (96, 64)]  # 128 for more
# By rows of a block: the product, and the gated one, which holds two tiles of weights.
CONFIGS = {
    16: (GroupedConfig(64, 256, 4, 4), GroupedConfig(32, 256, 4, 4)),
    32: (GroupedConfig(64, 256, 4, 4), GroupedConfig(32, 256, 4, 4)),
    64: (GroupedConfig(128, 128, 4, 4), GroupedConfig(64, 128, 4, 4)),
    128: (GroupedConfig(128, 128, 8, 4), GroupedConfig(128, 128, 8, 3)),
}


def choose_block_size(num_rows: int, num_experts: int) -> int:
    """Rows per block, for this many choices of experts."""
    mean = num_rows / num_experts
    return next((size for most, size in BLOCK_SIZES if mean <= most), 128)


# --- ordering by expert ---------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows", "blocks_in_all"])
def _align_kernel(
    ids_ptr,
    rows_ptr,
    block_experts_ptr,
    num_rows,
    blocks_in_all,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per expert. Each counts all experts' rows, to know where its own blocks begin."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0)
    row = tl.arange(0, ROWS_PADDED)
    ids = tl.load(ids_ptr + row, mask=row < num_rows, other=EXPERTS)  # behind the last row: no expert
    other = tl.arange(0, EXPERTS_PADDED)
    sizes = tl.histogram(ids, EXPERTS_PADDED)
    blocks = tl.where(other < EXPERTS, (sizes + BLOCK - 1) // BLOCK, 0)
    first = tl.sum(tl.where(other < expert, blocks, 0), axis=0)
    end = first + tl.sum(tl.where(other == expert, blocks, 0), axis=0)
    size = tl.sum(tl.where(other == expert, sizes, 0), axis=0)

    is_mine = ids == expert
    place = tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
    tl.store(rows_ptr + first * BLOCK + place, row, mask=is_mine)
    last = size // BLOCK * BLOCK + tl.arange(0, BLOCK)
    tl.store(rows_ptr + first * BLOCK + last, num_rows, mask=(last >= size) & (last < (end - first) * BLOCK))
    block = tl.arange(0, BLOCKS_PADDED)
    tl.store(block_experts_ptr + block, expert, mask=(block >= first) & (block < end))
    if expert == EXPERTS - 1:
        tl.store(block_experts_ptr + block, -1, mask=(block >= end) & (block < blocks_in_all))


def align_triton(expert_ids: Tensor, num_experts: int, block_size: int) -> tuple[Tensor, Tensor]:
    """See `moe.align`; up to MAX_ROWS_OF_ALIGN rows."""
    num_rows, device = expert_ids.numel(), expert_ids.device
    blocks = num_blocks(num_rows, num_experts, block_size)
    rows = torch.empty((blocks, block_size), dtype=torch.int32, device=device)
    block_experts = torch.empty(blocks, dtype=torch.int32, device=device)
    launch(
        _align_kernel, (num_experts,), device,
        expert_ids, rows, block_experts, num_rows, blocks,
        # At least one for each thread, of which each then counts its own.
        EXPERTS=num_experts, EXPERTS_PADDED=max(128, next_power_of_2(num_experts + 1)),
        ROWS_PADDED=max(128, next_power_of_2(num_rows)), BLOCKS_PADDED=next_power_of_2(blocks),
        BLOCK=block_size, num_warps=4,
    )  # fmt: skip
    return rows, block_experts


# --- products -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    rows_ptr,
    block_experts_ptr,
    out_ptr,
    num_rows,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS_PER_X: tl.constexpr,
    GATE: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[row] = expert's weight times x[row // ROWS_PER_X]: through the gate if there is one, else times scale[row].

    bias_ptr may be None. GATE: the activation of `moe.Gate`, or "".

    A block's tiles are neighbours in the grid, and so are the blocks of an expert: they meet in the L2 cache.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    tiles: tl.constexpr = (OUTPUTS + TILE - 1) // TILE
    block = tl.program_id(0) // tiles
    expert = tl.load(block_experts_ptr + block)
    if expert < 0:
        return
    index = tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + block * BLOCK + index)
    is_row = row < num_rows
    row = tl.where(is_row, row, 0).to(tl.int64)
    output = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    is_output = output < OUTPUTS
    PAIRED: tl.constexpr = (GATE != "") & (GATE != "relu2")
    planes: tl.constexpr = 2 if PAIRED else 1
    x_ptrs = x_ptr + (row // ROWS_PER_X)[:, None] * INPUTS
    weight_ptrs = weight_ptr + expert.to(tl.int64) * (planes * OUTPUTS * INPUTS)
    weight_ptrs += tl.minimum(output, OUTPUTS - 1)[None, :] * INPUTS
    first = tl.zeros([BLOCK, TILE], tl.float32)
    second = tl.zeros([BLOCK, TILE], tl.float32)
    for start in range(0, INPUTS, CHUNK):
        col = start + tl.arange(0, CHUNK)
        if INPUTS % CHUNK == 0:
            x = tl.load(x_ptrs + col[None, :], mask=is_row[:, None], other=0.0)
            weight = tl.load(weight_ptrs + col[:, None])
        else:
            x = tl.load(x_ptrs + col[None, :], mask=is_row[:, None] & (col < INPUTS)[None, :], other=0.0)
            weight = tl.load(weight_ptrs + col[:, None], mask=(col < INPUTS)[:, None], other=0.0)
        first = tl.dot(x, weight, first, input_precision="ieee")
        if PAIRED:
            up_ptrs = weight_ptrs + OUTPUTS * INPUTS
            if INPUTS % CHUNK == 0:
                up = tl.load(up_ptrs + col[:, None])
            else:
                up = tl.load(up_ptrs + col[:, None], mask=(col < INPUTS)[:, None], other=0.0)
            second = tl.dot(x, up, second, input_precision="ieee")
    dtype = out_ptr.dtype.element_ty
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * (planes * OUTPUTS) + tl.minimum(output, OUTPUTS - 1)[None, :]
        first += tl.load(bias_ptrs).to(tl.float32)
        if PAIRED:
            second += tl.load(bias_ptrs + OUTPUTS).to(tl.float32)
    if PAIRED:
        result = apply_gate(first, second, dtype, GATE, ALPHA, LIMIT)
    elif GATE == "relu2":
        result = tl.maximum(first.to(dtype).to(tl.float32), 0.0)
        result *= result
    else:
        result = first * tl.load(scale_ptr + row, mask=is_row, other=0.0)[:, None]
    mask = is_row[:, None] & is_output[None, :]
    tl.store(out_ptr + row[:, None] * OUTPUTS + output[None, :], result.to(dtype), mask=mask)


@triton.jit
def apply_gate(gate, up, dtype: tl.constexpr, GATE: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The gate's and the up product's sums, float32, as `moe.Gate` says."""
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    if GATE == "clamped":
        gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
    elif GATE == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        tanh = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * inner))
        return (0.5 * gate * (1.0 + tanh)).to(dtype).to(tl.float32) * up
    else:
        return (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up


@triton.jit
def _sum_kernel(x_ptr, out_ptr, WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out[token] = the sum of its TOP_K rows of x."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        total += tl.load(x_ptr + (token * TOP_K + i) * WIDTH + col, mask=col < WIDTH, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + col, total.to(out_ptr.dtype.element_ty), mask=col < WIDTH)


def fused_experts_triton(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    biases: Biases | None = None,
    gate: Gate = SILU,
    block_size: int | None = None,
) -> Tensor:
    """See `moe.fused_experts`."""
    num_tokens, top_k = expert_ids.shape
    num_experts, hidden_size, intermediate_size = down.shape
    out = torch.empty_like(x)
    if not num_tokens:
        return out
    block_size = block_size or choose_block_size(expert_ids.numel(), num_experts)
    rows, block_experts = align(expert_ids, num_experts, block_size)
    gated = torch.empty((expert_ids.numel(), intermediate_size), dtype=x.dtype, device=x.device)
    chosen = torch.empty((expert_ids.numel(), hidden_size), dtype=x.dtype, device=x.device)
    gate_up_bias, down_bias = (None, None) if biases is None else biases
    _multiply(x, gate_up, gate_up_bias, gate, None, rows, block_experts, block_size, gated, top_k)
    _multiply(gated, down, down_bias, None, weights, rows, block_experts, block_size, chosen, 1)
    sum_choices(chosen, out)
    return out


def sum_choices(chosen: Tensor, out: Tensor) -> None:
    """Writes out [num_tokens, hidden]: of each token, the sum of its rows of chosen [num_tokens * top_k, hidden]."""
    num_tokens, width = out.shape
    launch(
        _sum_kernel, (num_tokens, cdiv(width, SUM_BLOCK)), out.device,
        chosen, out, WIDTH=width, TOP_K=len(chosen) // num_tokens, BLOCK=SUM_BLOCK, num_warps=4,
    )  # fmt: skip


def _multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Gate | None,
    scale: Tensor | None,
    rows: Tensor,
    block_experts: Tensor,
    block_size: int,
    out: Tensor,
    rows_per_x: int,
) -> None:
    """Launch `_grouped_kernel`, with a gate or a scale."""
    config = CONFIGS[block_size][scale is None]
    num_rows, num_outputs = out.shape
    chunk = config.chunk // x.element_size()
    stage_bytes = config.chunk * (block_size + config.tile * (2 if scale is None else 1))
    launch(
        _grouped_kernel, (block_experts.numel() * cdiv(num_outputs, config.tile),), x.device,
        x, weight, bias, scale, rows, block_experts, out, num_rows,
        INPUTS=x.shape[1], OUTPUTS=num_outputs, ROWS_PER_X=rows_per_x,
        **gate_arguments(gate), BLOCK=block_size, TILE=config.tile, CHUNK=chunk,
        num_warps=config.num_warps, num_stages=_num_stages(x.device, config, stage_bytes),
    )  # fmt: skip


def gate_arguments(gate: Gate | None) -> dict[str, str | float]:
    activation, alpha, limit = gate or ("", 0.0, 0.0)
    return {"GATE": activation, "ALPHA": alpha, "LIMIT": limit}


def _num_stages(device: torch.device, config: GroupedConfig, stage_bytes: int) -> int:
    """What is wanted, or what fits into the shared memory of a multiprocessor."""
    if device.type != "cuda":
        return config.num_stages
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return max(1, min(config.num_stages, limit // stage_bytes))
