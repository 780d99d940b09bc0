"""One token through its experts in the model's dtype, by multiplying and adding in registers.

Owns the two kernels for a single token, whose work a shared expert and the sum are part of; more tokens are `moe.py`'s,
and MXFP4 is `mxfp4_experts.py`'s. A token reads the weights of its experts and computes little, so what counts is that
the reading never pauses. Before the choice of experts is known, the first programs ask for the shared expert's weights;
the second kernel finds the choice made, and asks for its first weights while the first one still runs. Invariant: a
sum's order follows from the sizes alone, and roundings are where `moe.py` has them.
"""

# Tuples of tiles grow while a kernel is compiled.
# mypy: disable-error-code="assignment, misc, var-annotated, no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.moe import SILU, Biases, Gate, Shared
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv
from nanovllm.kernels.triton.linear.parts import load_chunk
from nanovllm.kernels.triton.moe import apply_gate, gate_arguments


class VectorConfig(NamedTuple):
    """outputs: of a program. chunk: inputs per step; 256 is a warp's, of an output of its own; warps share longer ones.

    ahead: chunks that are held of each matrix.
    """

    outputs: int = 4
    chunk: int = 256
    ahead: int = 8
    num_warps: int = 4


GATE_UP = VectorConfig()
DOWN = VectorConfig(ahead=16)
LONG_GATE_UP = VectorConfig(chunk=2048, ahead=1, num_warps=8)
LONG_DOWN = VectorConfig(chunk=2048, ahead=2, num_warps=8)
MAX_CHUNKS = 80  # of 256 inputs that a program takes: its steps are written one behind the other


@triton.jit
def _gate_tile(
    x_ptr, matrix_ptr, bias_ptr, out_ptr, tile,
    INPUTS: tl.constexpr, SIZE: tl.constexpr, GATE: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OUTPUTS: tl.constexpr, REPEATS: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of out [SIZE]: the gate of one matrix times x. Asks for weights before it waits."""
    CHUNKS: tl.constexpr = (INPUTS + CHUNK - 1) // CHUNK
    PAIRED: tl.constexpr = GATE != "relu2"
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.minimum(output, SIZE - 1)
    place, col = row[:, None] * INPUTS, tl.arange(0, CHUNK)[None, :]
    repeat = tl.zeros([REPEATS, 1], tl.int32)
    up_ptr = matrix_ptr + SIZE * INPUTS
    weights, up_weights = (), ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        weights = weights + (load_chunk(matrix_ptr, place, col, i, INPUTS, CHUNK),)
        if PAIRED:
            up_weights = up_weights + (load_chunk(up_ptr, place, col, i, INPUTS, CHUNK),)
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now: what starts next reads the choice of experts at once, and that is there by now.
        tl.extra.cuda.gdc_launch_dependents()
    sums = tl.zeros([OUTPUTS, CHUNK], tl.float32)
    up_sums = tl.zeros([OUTPUTS, CHUNK], tl.float32)
    for i in tl.static_range(CHUNKS):
        if i + AHEAD < CHUNKS:
            weights = weights + (load_chunk(matrix_ptr, place, col, i + AHEAD, INPUTS, CHUNK),)
            if PAIRED:
                up_weights = up_weights + (load_chunk(up_ptr, place, col, i + AHEAD, INPUTS, CHUNK),)
        x = load_chunk(x_ptr, repeat, col, i, INPUTS, CHUNK).to(tl.float32)
        sums += weights[i].to(tl.float32) * x
        if PAIRED:
            up_sums += up_weights[i].to(tl.float32) * x
    dtype = out_ptr.dtype.element_ty
    result, up = tl.sum(sums, axis=1), tl.sum(up_sums, axis=1)
    if bias_ptr is not None:
        result += tl.load(bias_ptr + row).to(tl.float32)
        if PAIRED:
            up += tl.load(bias_ptr + SIZE + row).to(tl.float32)
    if PAIRED:
        result = apply_gate(result, up, dtype, GATE, ALPHA, LIMIT)
    else:
        result = tl.maximum(result.to(dtype).to(tl.float32), 0.0)
        result *= result
    tl.store(out_ptr + output, result.to(dtype), mask=output < SIZE)


@triton.jit
def _gate_up_vector_kernel(
    x_ptr,
    shared_ptr,
    weight_ptr,
    bias_ptr,
    experts_ptr,
    out_ptr,
    INPUTS: tl.constexpr,
    SHARED_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    GATE: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    REPEATS: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [SHARED_SIZE + top_k * SIZE]: of the shared expert, then of each choice. The first programs are the shared
    one's, whose weights need no choice."""
    shared_tiles: tl.constexpr = (SHARED_SIZE + OUTPUTS - 1) // OUTPUTS
    tiles: tl.constexpr = (SIZE + OUTPUTS - 1) // OUTPUTS
    planes: tl.constexpr = 1 if GATE == "relu2" else 2
    program = tl.program_id(0) - shared_tiles
    if shared_tiles > 0:  # noqa: SIM102 (known when it is compiled)
        if program < 0:
            _gate_tile(
                x_ptr, shared_ptr, None, out_ptr, program + shared_tiles,
                INPUTS, SHARED_SIZE, GATE, ALPHA, LIMIT, OUTPUTS, REPEATS, CHUNK, AHEAD, PDL,
            )  # fmt: skip
            return
    choice = program // tiles
    if PDL:
        tl.extra.cuda.gdc_wait()
    expert = tl.load(experts_ptr + choice).to(tl.int64)
    if bias_ptr is not None:
        bias_ptr += expert * (planes * SIZE)
    _gate_tile(
        x_ptr, weight_ptr + expert * (planes * SIZE * INPUTS), bias_ptr, out_ptr + SHARED_SIZE + choice * SIZE,
        program % tiles, INPUTS, SIZE, GATE, ALPHA, LIMIT, OUTPUTS, REPEATS, CHUNK, AHEAD, PDL,
    )  # fmt: skip


@triton.jit
def _load_step(
    shared_ptr, weight_ptr, row, offsets, col, i: tl.constexpr,
    SHARED_SIZE: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Chunk i of all that a row of outputs is multiplied by: the shared expert's inputs, then those of each choice."""
    SHARED_CHUNKS: tl.constexpr = (SHARED_SIZE + CHUNK - 1) // CHUNK
    CHUNKS: tl.constexpr = (SIZE + CHUNK - 1) // CHUNK
    if i < SHARED_CHUNKS:
        return load_chunk(shared_ptr, row * SHARED_SIZE, col, i, SHARED_SIZE, CHUNK)
    else:
        ptr = weight_ptr + offsets[(i - SHARED_CHUNKS) // CHUNKS]
        return load_chunk(ptr, row * SIZE, col, (i - SHARED_CHUNKS) % CHUNKS, SIZE, CHUNK)


@triton.jit
def _down_vector_kernel(
    x_ptr,
    shared_ptr,
    weight_ptr,
    bias_ptr,
    experts_ptr,
    scale_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    SHARED_SIZE: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    REPEATS: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [WIDTH]: the choices' products, each times its scale, added in their order; then the shared expert's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    SHARED_CHUNKS: tl.constexpr = (SHARED_SIZE + CHUNK - 1) // CHUNK
    CHUNKS: tl.constexpr = (SIZE + CHUNK - 1) // CHUNK
    STEPS: tl.constexpr = SHARED_CHUNKS + TOP_K * CHUNKS
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    first_row = tl.minimum(output, WIDTH - 1)
    row, col = first_row[:, None], tl.arange(0, CHUNK)[None, :]
    repeat = tl.zeros([REPEATS, 1], tl.int32)
    offsets = ()
    for choice in tl.static_range(TOP_K):
        offsets = offsets + (tl.load(experts_ptr + choice).to(tl.int64) * (WIDTH * SIZE),)
    weights = ()
    for i in tl.static_range(min(AHEAD, STEPS)):
        weights = weights + (_load_step(shared_ptr, weight_ptr, row, offsets, col, i, SHARED_SIZE, SIZE, CHUNK),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    dtype = out_ptr.dtype.element_ty
    shared = tl.zeros([OUTPUTS, CHUNK], tl.float32)
    for i in tl.static_range(SHARED_CHUNKS):
        if i + AHEAD < STEPS:
            later = _load_step(shared_ptr, weight_ptr, row, offsets, col, i + AHEAD, SHARED_SIZE, SIZE, CHUNK)
            weights = weights + (later,)
        x = load_chunk(x_ptr, repeat, col, i, SHARED_SIZE, CHUNK)
        shared += weights[i].to(tl.float32) * x.to(tl.float32)
    x_ptr += SHARED_SIZE
    total = tl.zeros([OUTPUTS], tl.float32)
    for choice in tl.static_range(TOP_K):
        sums = tl.zeros([OUTPUTS, CHUNK], tl.float32)
        for i in tl.static_range(CHUNKS):
            if SHARED_CHUNKS + choice * CHUNKS + i + AHEAD < STEPS:
                later = _load_step(
                    shared_ptr, weight_ptr, row, offsets, col, SHARED_CHUNKS + choice * CHUNKS + i + AHEAD,
                    SHARED_SIZE, SIZE, CHUNK,
                )  # fmt: skip
                weights = weights + (later,)
            x = load_chunk(x_ptr + choice * SIZE, repeat, col, i, SIZE, CHUNK)
            sums += weights[SHARED_CHUNKS + choice * CHUNKS + i].to(tl.float32) * x.to(tl.float32)
        product = tl.sum(sums, axis=1)
        if bias_ptr is not None:
            product += tl.load(bias_ptr + tl.load(experts_ptr + choice) * WIDTH + first_row).to(tl.float32)
        total += (product * tl.load(scale_ptr + choice)).to(dtype).to(tl.float32)
    result = total.to(dtype)
    if SHARED_SIZE > 0:
        result = (result.to(tl.float32) + tl.sum(shared, axis=1).to(dtype).to(tl.float32)).to(dtype)
    tl.store(out_ptr + output, result, mask=output < WIDTH)


def vector_experts_triton(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    biases: Biases | None = None,
    gate: Gate = SILU,
    shared: Shared | None = None,
) -> Tensor:
    """`moe.fused_experts` of one token."""
    top_k, (_, hidden_size, size) = expert_ids.shape[1], down.shape
    shared_gate_up, shared_down = (None, None) if shared is None else shared
    shared_size = 0 if shared is None else shared.down.shape[1]
    gate_up_bias, down_bias = (None, None) if biases is None else biases
    gated = torch.empty(shared_size + top_k * size, dtype=x.dtype, device=x.device)
    out = torch.empty_like(x)
    config = GATE_UP if cdiv(hidden_size, 256) <= MAX_CHUNKS // 2 else LONG_GATE_UP
    launch(
        _gate_up_vector_kernel, (cdiv(shared_size, config.outputs) + top_k * cdiv(size, config.outputs),), x.device,
        x, shared_gate_up, gate_up, gate_up_bias, expert_ids, gated,
        INPUTS=hidden_size, SHARED_SIZE=shared_size, SIZE=size, **gate_arguments(gate), **_arguments(config),
    )  # fmt: skip
    config = DOWN if cdiv(shared_size, 256) + top_k * cdiv(size, 256) <= MAX_CHUNKS else LONG_DOWN
    launch(
        _down_vector_kernel, (cdiv(hidden_size, config.outputs),), x.device,
        gated, shared_down, down, down_bias, expert_ids, weights, out,
        WIDTH=hidden_size, SHARED_SIZE=shared_size, SIZE=size, TOP_K=top_k, **_arguments(config),
    )  # fmt: skip
    return out


def _arguments(config: VectorConfig) -> dict[str, int]:
    return {
        "OUTPUTS": config.outputs,
        "REPEATS": config.outputs if config.chunk == 256 else 1,  # a row of x lies where the weights do
        "CHUNK": config.chunk,
        "AHEAD": config.ahead,
        "num_warps": config.num_warps,
    }
