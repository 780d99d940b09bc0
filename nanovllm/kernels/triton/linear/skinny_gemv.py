"""GEMV in Triton: products of a row or two by multiply and add, a lane along the inputs.

Owns that kernel and its shape; which products it is for is `skinny_linear.py`'s to say. Invariant: a sum is added up
in an order that the sizes alone determine.
"""

# Tuples of tiles grow while a kernel is compiled.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv
from nanovllm.kernels.triton.linear.parts import add_residual, finish, load_chunk, normalize


@dataclass(frozen=True)
class GemvConfig:
    """outputs: per program. chunk: inputs per step, 256 for each warp that shares an output with others.

    ahead: weights that a thread holds, in loads of 16 bytes per output of the thread.
    """

    outputs: int
    num_warps: int
    ahead: int
    chunk: int = 256


@triton.jit
def _multiply_add(sums, w, xs, ROWS: tl.constexpr):
    """One sum for each row: the tile of weights times that row's tile of inputs."""
    added = ()
    for r in tl.static_range(ROWS):
        added = added + (sums[r] + w.to(tl.float32) * xs[r].to(tl.float32),)
    return added


class Beside(NamedTuple):
    """A few more products with the one row of x, which take no launch of their own: a[slots[0]] x, in float32.

    a [num_slots, outputs, inputs]; slots [1] int32, where num_slots stands for none; out [1, outputs].
    """

    a: Tensor
    slots: Tensor
    out: Tensor


@triton.jit
def _multiply_beside(
    x_ptr, a_ptr, slots_ptr, out_ptr, num_slots, tile,
    NUM: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    SHARED: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`Beside`: as the tiles of the weights. Without an adapter, it is another's product, which nobody reads."""
    CHUNKS: tl.constexpr = (INPUTS + CHUNK - 1) // CHUNK
    slot = tl.minimum(tl.load(slots_ptr), num_slots - 1)
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    col = tl.arange(0, CHUNK)[None, :]
    place = slot.to(tl.int64) * (NUM * INPUTS) + tl.minimum(output, NUM - 1)[:, None] * INPUTS
    repeat = tl.zeros([SHARED, 1], tl.int32)
    weights = ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        weights = weights + (load_chunk(a_ptr, place, col, i, INPUTS, CHUNK),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([OUTPUTS, CHUNK], tl.float32)
    for i in tl.static_range(CHUNKS):
        if i + AHEAD < CHUNKS:
            weights = weights + (load_chunk(a_ptr, place, col, i + AHEAD, INPUTS, CHUNK),)
        sums += weights[i].to(tl.float32) * load_chunk(x_ptr, repeat, col, i, INPUTS, CHUNK).to(tl.float32)
    tl.store(out_ptr + output, tl.sum(sums, axis=1), mask=output < NUM)


@triton.jit(do_not_specialize=["num_slots"])
def _gemv_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    a_ptr,
    slots_ptr,
    beside_ptr,
    num_slots,
    num_outputs,
    x_stride,
    residual_stride,
    eps,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SHARED: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    BESIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Every tile of weights is [OUTPUTS, CHUNK], and a chunk one load per lane. Short inputs: a warp has whole outputs
    to itself, no data passes between warps, and a row of x is repeated for each output, so that all lies where the
    weights do. Long inputs: warps share outputs and lie along the chunk, and so does a row of x as it is (SHARED = 1).
    BESIDE: so many products of `Beside`; the first programs' work, so that it is done long before the others are.
    """
    CHUNKS: tl.constexpr = (INPUTS + CHUNK - 1) // CHUNK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    TILES_BESIDE: tl.constexpr = (BESIDE + OUTPUTS - 1) // OUTPUTS
    tile = tl.program_id(0) - TILES_BESIDE
    if BESIDE > 0:  # noqa: SIM102 (known when it is compiled)
        if tile < 0:
            _multiply_beside(
                x_ptr, a_ptr, slots_ptr, beside_ptr, num_slots, tile + TILES_BESIDE,
                BESIDE, INPUTS, OUTPUTS, SHARED, CHUNK, AHEAD, PDL,
            )  # fmt: skip
            return
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    col = tl.arange(0, CHUNK)[None, :]
    place = tl.minimum(output, num_outputs - 1)[:, None] * INPUTS
    repeat = tl.zeros([SHARED, 1], tl.int32)
    up_ptr = weight_ptr + num_outputs * INPUTS
    weights = ()
    up_weights = ()
    norm_weights = ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        weights = weights + (load_chunk(weight_ptr, place, col, i, INPUTS, CHUNK),)
        if GATED:
            up_weights = up_weights + (load_chunk(up_ptr, place, col, i, INPUTS, CHUNK),)
    if NORM:
        for i in tl.static_range(CHUNKS):
            norm_weights = norm_weights + (load_chunk(norm_weight_ptr, repeat, col, i, INPUTS, CHUNK),)
    if PDL:
        tl.extra.cuda.gdc_wait()

    totals = ()
    scales = ()
    zeros = ()
    for r in tl.static_range(ROWS):
        zeros = zeros + (tl.zeros([OUTPUTS, CHUNK], tl.float32),)
        if NORM:
            squares = tl.zeros([SHARED, CHUNK], tl.float32)
            for i in tl.static_range(CHUNKS):
                x = load_chunk(x_ptr, r * x_stride + repeat, col, i, INPUTS, CHUNK)
                if ADD:
                    x = add_residual(x, load_chunk(residual_ptr, r * residual_stride + repeat, col, i, INPUTS, CHUNK))
                totals = totals + (x,)
                squares += x.to(tl.float32) * x.to(tl.float32)
            scales = scales + (tl.rsqrt(tl.sum(squares, axis=1) / INPUTS + eps)[:, None],)
    if ADD:
        # Every program holds every row; the first program writes them.
        written = (tl.arange(0, SHARED) == 0)[:, None] & (tile == 0)
        for r in tl.static_range(ROWS):
            for i in tl.static_range(CHUNKS):
                mask = written & (col < INPUTS - i * CHUNK)
                tl.store(total_ptr + r * INPUTS + repeat + i * CHUNK + col, totals[r * CHUNKS + i], mask=mask)

    sums = zeros
    up_sums = zeros
    for i in tl.static_range(CHUNKS):
        if i + AHEAD < CHUNKS:
            weights = weights + (load_chunk(weight_ptr, place, col, i + AHEAD, INPUTS, CHUNK),)
            if GATED:
                up_weights = up_weights + (load_chunk(up_ptr, place, col, i + AHEAD, INPUTS, CHUNK),)
        xs = ()
        for r in tl.static_range(ROWS):
            if NORM:
                xs = xs + (normalize(totals[r * CHUNKS + i], scales[r], norm_weights[i]),)
            else:
                xs = xs + (load_chunk(x_ptr, r * x_stride + repeat, col, i, INPUTS, CHUNK),)
        sums = _multiply_add(sums, weights[i], xs, ROWS)
        if GATED:
            up_sums = _multiply_add(up_sums, up_weights[i], xs, ROWS)
    valid = output < num_outputs
    for r in tl.static_range(ROWS):
        result = finish(
            tl.sum(sums[r], axis=1), tl.sum(up_sums[r], axis=1), bias_ptr,
            output, valid, num_outputs, out_ptr.dtype.element_ty, GATED, GELU, BIAS,
        )  # fmt: skip
        tl.store(out_ptr + r * num_outputs + output, result, mask=valid)


def launch_gemv(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    config: GemvConfig,
    gated: bool,
    gelu: bool,
    beside: Beside | None = None,
) -> None:
    """Writes out [num_rows, outputs], and x + residual into total if there is a residual. beside: of one row without a
    norm.
    """
    num_rows, num_outputs = out.shape
    num_beside = 0 if beside is None else beside.a.shape[1]
    given = (None, None, None, 0) if beside is None else (*beside, beside.a.shape[0])
    launch(
        _gemv_kernel, (cdiv(num_beside, config.outputs) + cdiv(num_outputs, config.outputs),), x.device,
        x, residual, norm_weight, weight, bias, out, total, *given, num_outputs,
        x.stride(0), 0 if residual is None else residual.stride(0), eps,
        ROWS=num_rows, INPUTS=weight.shape[1], NORM=norm_weight is not None, ADD=residual is not None, GATED=gated,
        GELU=gelu, BIAS=bias is not None, OUTPUTS=config.outputs, SHARED=config.outputs if config.chunk == 256 else 1,
        CHUNK=config.chunk, AHEAD=config.ahead, BESIDE=num_beside, num_warps=config.num_warps,
    )  # fmt: skip
