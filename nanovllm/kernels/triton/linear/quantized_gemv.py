"""The product of a row with quantized weights, in registers; norm, rounding of inputs and gate fused.

Owns that kernel; which products it is for is `quantized_linear.py`'s to say. A program has some outputs at a time. A
lane loads 16 bytes of each output's codes, and has the inputs that meet them from its first tile to its last
(`row_inputs.py`). Whole codes are multiplied as they lie in their word, by inputs that are whole numbers of 16 bits in
units of the lane's largest: two products an instruction (dp2a), and no code is ever a number of its own. FP8 becomes
float32, and is multiplied by the inputs as they are.
Invariant: a row's sums are added in an order that the sizes alone determine.
"""

# Tuples of tiles grow while a kernel is compiled.
# mypy: disable-error-code="assignment, attr-defined, misc, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.quantized_linear import NormOfRow, QuantizedWeight, RowRounding
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv
from nanovllm.kernels.triton.linear.parts import finish
from nanovllm.kernels.triton.linear.row_inputs import add_rows, load_row, norm_row, round_row, store_row, whole_chunk
from nanovllm.kernels.triton.linear.words import WORDS, multiply_words

LANE_INPUTS = {torch.uint8: 32, torch.int8: 16, torch.float8_e4m3fn: 16}  # in the words that a lane loads at a time
_KINDS = {torch.uint8: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@triton.jit
def _load_chunk(
    codes_ptr, scale_ptr, zero_ptr, low_ptr, tile, is_wanted, i: tl.constexpr,
    NUM_OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, SCALES: tl.constexpr,
    OUTPUTS: tl.constexpr, PLANES: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Chunk i of a tile's rows: words [LANES, ROWS, WORDS], and what each lane's group has: scales, zeros, lows."""
    ROW_LANES: tl.constexpr = INPUTS // (PARTS * WORDS)
    row = tl.arange(0, OUTPUTS * PLANES)
    output = row // PLANES
    if NUM_OUTPUTS % OUTPUTS:
        output = tl.minimum(output, NUM_OUTPUTS - 1 - tile * OUTPUTS)
    row = output + row % PLANES * NUM_OUTPUTS
    lane = i * LANES + tl.arange(0, LANES)[:, None]
    # What a tile adds to an address is one number, and what its rows add is known when it is compiled.
    first_row = tile.to(tl.int64) * OUTPUTS
    place = (row[None, :] * ROW_LANES + lane)[:, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    codes_ptr += first_row * (ROW_LANES * WORDS)
    group = first_row * SCALES + (row[None, :] * SCALES + lane // (ROW_LANES // SCALES))
    zero, low = 0, 0.0
    if (i + 1) * LANES <= ROW_LANES:
        words = tl.load(codes_ptr + place, mask=is_wanted)
        scale = tl.load(scale_ptr + group, mask=is_wanted)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + group, mask=is_wanted)
        if low_ptr is not None:
            low = tl.load(low_ptr + group, mask=is_wanted)
    else:
        mask = (lane < ROW_LANES) & is_wanted
        words = tl.load(codes_ptr + place, mask=mask[:, :, None], other=0)
        scale = tl.load(scale_ptr + group, mask=mask, other=0.0)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + group, mask=mask, other=0)
        if low_ptr is not None:
            low = tl.load(low_ptr + group, mask=mask, other=0.0)
    return words, scale, zero, low


@triton.jit
def _quantized_vector_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    round_scale_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    low_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    eps,
    NUM_OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SCALES: tl.constexpr,
    KIND: tl.constexpr,
    ROUND: tl.constexpr,
    ROUND_LANES: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
    LOOPS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    PARTS: tl.constexpr = 8 if KIND == "int4" else 4
    TILES: tl.constexpr = (NUM_OUTPUTS + OUTPUTS - 1) // OUTPUTS
    PLANES: tl.constexpr = 2 if GATED else 1
    IS_FP8: tl.constexpr = KIND == "fp8"
    OFFSET: tl.constexpr = 8 if KIND == "int4" and low_ptr is None else 0  # what is added to each code
    tile = tl.program_id(0)
    chunks = ()
    for i in tl.static_range(AHEAD):
        later = tile + i // CHUNKS * tl.num_programs(0)
        chunks = chunks + _load_chunk(
            codes_ptr, scale_ptr, zero_ptr, low_ptr, later, later < TILES, i % CHUNKS,
            NUM_OUTPUTS, INPUTS, SCALES, OUTPUTS, PLANES, LANES, PARTS,
        )  # fmt: skip
    if norm_weight_ptr is not None:
        norm_weight = load_row(norm_weight_ptr, CHUNKS, INPUTS, LANES, PARTS)
    if PDL:
        tl.extra.cuda.gdc_wait()

    x = load_row(x_ptr, CHUNKS, INPUTS, LANES, PARTS)
    if residual_ptr is not None:
        x = add_rows(x, load_row(residual_ptr, CHUNKS, INPUTS, LANES, PARTS), CHUNKS * PARTS)
        if tile == 0:
            store_row(total_ptr, x, CHUNKS, INPUTS, LANES, PARTS)
    if norm_weight_ptr is not None:
        x = norm_row(x, norm_weight, eps, INPUTS, CHUNKS * PARTS)
    if ROUND is not None:
        x = round_row(x, round_scale_ptr, ROUND == "fp8", ROUND_LANES, CHUNKS, LANES, PARTS)
    inputs, totals, units = (), (), ()
    for i in tl.static_range(CHUNKS):
        own = x[i * PARTS : (i + 1) * PARTS]
        if IS_FP8:
            for j in tl.static_range(PARTS):
                inputs = inputs + (own[j].to(tl.float32),)
        else:
            pairs, total, unit = whole_chunk(own, PARTS)
            inputs, totals, units = inputs + pairs, totals + (total[:, None],), units + (unit[:, None],)

    while tile < TILES:
        output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        acc = tl.zeros([LANES, OUTPUTS * PLANES], tl.float32)
        held = chunks
        for i in tl.static_range(CHUNKS):
            if LOOPS or i + AHEAD < CHUNKS:
                later = tile + (i + AHEAD) // CHUNKS * tl.num_programs(0)
                held = held + _load_chunk(
                    codes_ptr, scale_ptr, zero_ptr, low_ptr, later, later < TILES, (i + AHEAD) % CHUNKS,
                    NUM_OUTPUTS, INPUTS, SCALES, OUTPUTS, PLANES, LANES, PARTS,
                )  # fmt: skip
            words, scale, zero, low = held[4 * i], held[4 * i + 1], held[4 * i + 2], held[4 * i + 3]
            if IS_FP8:
                sums = multiply_words(words, inputs, i * PARTS, KIND) * scale.to(tl.float32)
            else:
                whole = multiply_words(words, inputs, i * (PARTS // 2), KIND)
                if zero_ptr is not None:
                    whole -= (zero.to(tl.int32) + OFFSET) * totals[i]
                elif OFFSET > 0:
                    whole -= OFFSET * totals[i]
                sums = whole.to(tl.float32) * scale.to(tl.float32)
                if low_ptr is not None:
                    sums += low.to(tl.float32) * totals[i].to(tl.float32)
                sums *= units[i]
            acc += sums
        if LOOPS:
            chunks = held[4 * CHUNKS :]
        tile += tl.num_programs(0)
        result = tl.sum(acc, axis=0)
        second = result
        if GATED:
            result, second = tl.split(tl.reshape(result, [OUTPUTS, 2]))
        valid = output < NUM_OUTPUTS
        result = finish(
            result, second, bias_ptr, output, valid, NUM_OUTPUTS, out_ptr.dtype.element_ty, GATED, GELU,
            bias_ptr is not None,
        )  # fmt: skip
        tl.store(out_ptr + output, result, mask=valid)


class GemvConfig(NamedTuple):
    """outputs: of a program at a time. lanes: that share them. programs: at most; each has as many tiles as it takes.

    ahead: chunks of codes that are on their way while one is multiplied. The compiler asks for them at a tile's end.
    """

    outputs: int
    lanes: int
    num_warps: int
    ahead: int = 1
    programs: int = 2**31 - 1


def launch_gemv(
    x: Tensor,
    norm: NormOfRow | None,
    weight: QuantizedWeight,
    bias: Tensor | None,
    out: Tensor,
    config: GemvConfig,
    rounding: RowRounding | None = None,
    gate: str | None = None,
) -> Tensor:
    """Writes `quantized_linear.fused_row` into out [1, outputs]; returns x, or x + residual."""
    codes, scale, zero, _, low = weight
    num_outputs, tiles = out.shape[1], cdiv(out.shape[1], config.outputs)
    residual, norm_weight, eps = (None, None, 0.0) if norm is None else norm
    round_kind, round_size, round_scale = (None, None, None) if rounding is None else rounding
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = min(tiles, config.programs)
    chunks = cdiv(x.shape[1], config.lanes * LANE_INPUTS[codes.dtype])
    ahead = config.ahead if tiles > programs else min(config.ahead, chunks)
    launch(
        _quantized_vector_kernel, (programs,), x.device,
        x, residual, norm_weight, round_scale, codes.view(torch.uint32), scale, zero, low, bias, out, total,
        eps, NUM_OUTPUTS=num_outputs, INPUTS=x.shape[1], SCALES=scale.shape[1], KIND=_KINDS[codes.dtype],
        ROUND=round_kind, ROUND_LANES=0 if round_size is None else round_size // LANE_INPUTS[codes.dtype],
        GATED=gate is not None, GELU=gate == "gelu_tanh", OUTPUTS=config.outputs, LANES=config.lanes, CHUNKS=chunks,
        AHEAD=ahead, LOOPS=tiles > programs, num_warps=config.num_warps,
    )  # fmt: skip
    return total
