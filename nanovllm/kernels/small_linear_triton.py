"""Triton twin of `small_linear.py`: three kernels for up to 64 rows, and the choice among them.

Owns how few rows are multiplied on a GPU. A decode step reads every weight once and computes little, so what counts is
that the reading never pauses, not even from one kernel to the next: each program asks for its weights before it waits for
the kernel ahead (`dependent_launch`). Invariant: sums are added in an order that the sizes alone determine.

    rows     kernel     a program's weights, before it waits             product
    1 .. 4   vector     into registers                                   multiply and add, a lane along the inputs
    5 .. 16  tile       into registers                                   matrix unit, warps split the inputs
    .. 64    stream     into the L2 cache                                matrix unit, programs may split the inputs

The norm needs all of a row before its first product. The first two kernels compute it in every program, from rows that
are few enough to hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.dependent_launch import has_dependent_launch

MAX_ROWS = 64
MAX_COLUMNS_OF_SPLITS = 4096  # programs along the outputs that a split product may have


@dataclass(frozen=True)
class VectorConfig:
    """outputs: per program. ahead: weights that a thread holds, in loads of 16 bytes per output of the thread."""

    outputs: int
    num_warps: int
    ahead: int


@dataclass(frozen=True)
class TileConfig:
    """outputs: per program. slices: parts of the inputs, a warp or more for each. chunk: inputs per step of the loop."""

    outputs: int
    num_warps: int
    slices: int
    chunk: int
    ahead: int


@dataclass(frozen=True)
class StreamConfig:
    """outputs, inputs: of a tile. splits: programs that share the inputs of one tile of outputs."""

    outputs: int
    inputs: int
    splits: int
    num_stages: int
    num_warps: int


Config = VectorConfig | TileConfig | StreamConfig


def choose(x: Tensor, weight: Tensor, gated: bool = False, normed: bool = False) -> Config | None:
    """The kernel for x [num_rows, in_features] and weight [out_features, in_features]; None: leave it to cuBLAS.

    Looks at sizes, strides, dtypes and alignment only.
    """
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    if (
        not 0 < num_rows <= MAX_ROWS
        or x.dtype not in (torch.float16, torch.bfloat16)
        or weight.dtype != x.dtype
        or num_outputs % 16
        or num_inputs % 16
        or x.stride(1) != 1
        or not weight.is_contiguous()
        or weight.data_ptr() % 16
    ):
        return None
    return choose_by_size(num_rows, num_outputs, num_inputs, gated, normed)


def choose_by_size(num_rows: int, num_outputs: int, num_inputs: int, gated: bool, normed: bool) -> Config | None:
    """See `choose`; num_outputs counts what comes out, so half the weight's rows if gated."""
    planes = 2 if gated else 1
    if num_rows <= 4:
        if normed and triton.next_power_of_2(num_rows) * num_inputs > 4096:
            return None
        chunks = triton.cdiv(num_inputs, 256)
        # Enough outputs per thread that its weights fill some 16 loads, as long as all multiprocessors have work.
        per_warp = 1
        while per_warp * 2 * chunks * planes <= 16 and num_outputs // (per_warp * 2 * 4) >= 256:
            per_warp *= 2
        return VectorConfig(outputs=4 * per_warp, num_warps=4, ahead=max(1, 16 // (per_warp * planes)))
    if num_rows <= 16:
        if num_inputs > 4096 or (normed and num_inputs > 1024):
            return None
        return TileConfig(outputs=16, num_warps=8, slices=8, chunk=512, ahead=6 // planes)
    if normed:
        return None
    splits = 1
    while splits < 8 and num_outputs // 64 * splits < 64 and num_inputs // (splits * 2) >= 256:
        splits *= 2
    return StreamConfig(outputs=64 // planes, inputs=64, splits=splits, num_stages=4, num_warps=4)


# --- parts that the kernels share ---------------------------------------------------------


@triton.jit
def _load(ptr, offset, col, i: tl.constexpr, INPUTS: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk i of the rows at `offset`; `col` counts from 0 to CHUNK. Behind the last input there are zeros."""
    if (i + 1) * CHUNK <= INPUTS:
        return tl.load(ptr + offset + i * CHUNK + col)
    else:
        return tl.load(ptr + offset + i * CHUNK + col, mask=col < INPUTS - i * CHUNK, other=0.0)


@triton.jit
def _add(x, residual):
    return (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)


@triton.jit
def _normalize(x, scale, norm_weight):
    normed = (x.to(tl.float32) * scale).to(x.dtype)
    return (normed.to(tl.float32) * norm_weight.to(tl.float32)).to(x.dtype)


@triton.jit
def _finish(first, second, bias_ptr, output, mask, num_outputs, dtype, GATED: tl.constexpr, BIAS: tl.constexpr):
    """From float32 sums to what is stored: bias, rounding, gate. `output`, `mask`: which outputs, in the sums' shape."""
    if BIAS:
        first += tl.load(bias_ptr + output, mask=mask, other=0.0).to(tl.float32)
    result = first.to(dtype)
    if GATED:
        if BIAS:
            second += tl.load(bias_ptr + num_outputs + output, mask=mask, other=0.0).to(tl.float32)
        gate = result.to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        result = (silu * second.to(dtype).to(tl.float32)).to(dtype)
    return result


# --- 1 to 4 rows ---------------------------------------------------------------------------


@triton.jit
def _multiply_add(sums, w, xs, ROWS: tl.constexpr):
    """One sum for each row: the tile of weights times that row's tile of inputs."""
    added = ()
    for r in tl.static_range(ROWS):
        added = added + (sums[r] + w.to(tl.float32) * xs[r].to(tl.float32),)
    return added


@triton.jit
def _vector_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    num_outputs,
    x_stride,
    residual_stride,
    eps,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Every tile is [OUTPUTS, CHUNK], that of a row of x with equal rows, so everything lies where the weights do. A chunk
    is one load per lane: a warp has whole outputs to itself, and no data passes between warps."""
    CHUNKS: tl.constexpr = (INPUTS + CHUNK - 1) // CHUNK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    col = tl.arange(0, CHUNK)[None, :]
    place = tl.minimum(output, num_outputs - 1)[:, None] * INPUTS
    repeat = tl.zeros([OUTPUTS, 1], tl.int32)
    up_ptr = weight_ptr + num_outputs * INPUTS
    weights = ()
    up_weights = ()
    norm_weights = ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        weights = weights + (_load(weight_ptr, place, col, i, INPUTS, CHUNK),)
        if GATED:
            up_weights = up_weights + (_load(up_ptr, place, col, i, INPUTS, CHUNK),)
    if NORM:
        for i in tl.static_range(CHUNKS):
            norm_weights = norm_weights + (_load(norm_weight_ptr, repeat, col, i, INPUTS, CHUNK),)
    if PDL:
        tl.extra.cuda.gdc_wait()

    totals = ()
    scales = ()
    zeros = ()
    for r in tl.static_range(ROWS):
        zeros = zeros + (tl.zeros([OUTPUTS, CHUNK], tl.float32),)
        if NORM:
            squares = tl.zeros([OUTPUTS, CHUNK], tl.float32)
            for i in tl.static_range(CHUNKS):
                x = _load(x_ptr, r * x_stride + repeat, col, i, INPUTS, CHUNK)
                if ADD:
                    x = _add(x, _load(residual_ptr, r * residual_stride + repeat, col, i, INPUTS, CHUNK))
                totals = totals + (x,)
                squares += x.to(tl.float32) * x.to(tl.float32)
            scales = scales + (tl.rsqrt(tl.sum(squares, axis=1) / INPUTS + eps)[:, None],)
    if ADD:
        # Every program holds every row; the first program writes them.
        for r in tl.static_range(ROWS):
            for i in tl.static_range(CHUNKS):
                mask = (output == 0)[:, None] & (col < INPUTS - i * CHUNK)
                tl.store(total_ptr + r * INPUTS + repeat + i * CHUNK + col, totals[r * CHUNKS + i], mask=mask)

    sums = zeros
    up_sums = zeros
    for i in tl.static_range(CHUNKS):
        if i + AHEAD < CHUNKS:
            weights = weights + (_load(weight_ptr, place, col, i + AHEAD, INPUTS, CHUNK),)
            if GATED:
                up_weights = up_weights + (_load(up_ptr, place, col, i + AHEAD, INPUTS, CHUNK),)
        xs = ()
        for r in tl.static_range(ROWS):
            if NORM:
                xs = xs + (_normalize(totals[r * CHUNKS + i], scales[r], norm_weights[i]),)
            else:
                xs = xs + (_load(x_ptr, r * x_stride + repeat, col, i, INPUTS, CHUNK),)
        sums = _multiply_add(sums, weights[i], xs, ROWS)
        if GATED:
            up_sums = _multiply_add(up_sums, up_weights[i], xs, ROWS)
    valid = output < num_outputs
    for r in tl.static_range(ROWS):
        result = _finish(
            tl.sum(sums[r], axis=1), tl.sum(up_sums[r], axis=1), bias_ptr,
            output, valid, num_outputs, out_ptr.dtype.element_ty, GATED, BIAS,
        )  # fmt: skip
        tl.store(out_ptr + r * num_outputs + output, result, mask=valid)


# --- 5 to 16 rows --------------------------------------------------------------------------


@triton.jit
def _sliced_product(acc, w, x, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SLICES: tl.constexpr, CHUNK: tl.constexpr):
    """acc [SLICES, OUTPUTS, ROWS] += w [OUTPUTS, CHUNK] x^T [CHUNK, ROWS], each slice of the chunk by itself."""
    w = tl.permute(tl.reshape(w, [OUTPUTS, SLICES, CHUNK // SLICES]), [1, 0, 2])
    x = tl.permute(tl.reshape(x, [ROWS, SLICES, CHUNK // SLICES]), [1, 2, 0])
    return tl.dot(w, x, acc)


@triton.jit(do_not_specialize=["num_rows"])
def _tile_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    num_rows,
    num_outputs,
    x_stride,
    residual_stride,
    eps,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """The weights are the left operand: then 8 rows fill the matrix unit, which takes 16 outputs at a time."""
    CHUNKS: tl.constexpr = (INPUTS + CHUNK - 1) // CHUNK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    col = tl.arange(0, CHUNK)[None, :]
    place = tl.minimum(output, num_outputs - 1)[:, None] * INPUTS
    weights = ()
    seconds = ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        weights = weights + (_load(weight_ptr, place, col, i, INPUTS, CHUNK),)
        if GATED:
            up_ptr = weight_ptr + num_outputs * INPUTS
            seconds = seconds + (_load(up_ptr, place, col, i, INPUTS, CHUNK),)
    if PDL:
        tl.extra.cuda.gdc_wait()

    index = tl.arange(0, ROWS)
    row = tl.minimum(index, num_rows - 1)[:, None]
    x_offset = row * x_stride
    residual_offset = row * residual_stride
    xs = ()
    scale = 0.0
    if NORM:
        squares = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(CHUNKS):
            x = _load(x_ptr, x_offset, col, i, INPUTS, CHUNK)
            if ADD:
                x = _add(x, _load(residual_ptr, residual_offset, col, i, INPUTS, CHUNK))
            xs = xs + (x,)
            value = x.to(tl.float32)
            squares += tl.sum(value * value, axis=1)
        scale = tl.rsqrt(squares / INPUTS + eps)[:, None]
        if ADD:
            written = (index < num_rows)[:, None] & (tl.program_id(0) == 0)
            for i in tl.static_range(CHUNKS):
                mask = written & (col < INPUTS - i * CHUNK)
                tl.store(total_ptr + index[:, None] * INPUTS + i * CHUNK + col, xs[i], mask=mask)

    first = tl.zeros([SLICES, OUTPUTS, ROWS], tl.float32)
    second = tl.zeros([SLICES, OUTPUTS, ROWS], tl.float32)
    for i in tl.static_range(CHUNKS):
        if i + AHEAD < CHUNKS:
            weights = weights + (_load(weight_ptr, place, col, i + AHEAD, INPUTS, CHUNK),)
            if GATED:
                up_ptr = weight_ptr + num_outputs * INPUTS
                seconds = seconds + (_load(up_ptr, place, col, i + AHEAD, INPUTS, CHUNK),)
        if NORM:
            norm_weight = _load(norm_weight_ptr, 0, col, i, INPUTS, CHUNK)
            x = _normalize(xs[i], scale, norm_weight)
        else:
            x = _load(x_ptr, x_offset, col, i, INPUTS, CHUNK)
        first = _sliced_product(first, weights[i], x, ROWS, OUTPUTS, SLICES, CHUNK)
        if GATED:
            second = _sliced_product(second, seconds[i], x, ROWS, OUTPUTS, SLICES, CHUNK)
    valid = (output < num_outputs)[:, None]
    result = _finish(
        tl.sum(first, axis=0), tl.sum(second, axis=0), bias_ptr,
        output[:, None], valid, num_outputs, out_ptr.dtype.element_ty, GATED, BIAS,
    )  # fmt: skip
    mask = valid & (index < num_rows)[None, :]
    tl.store(out_ptr + index[None, :] * num_outputs + output[:, None], result, mask=mask)


# --- up to 64 rows -------------------------------------------------------------------------


@triton.jit
def _prefetch(ptr, num_bytes):
    """Asks for num_bytes, a multiple of 16, behind each pointer to be brought into the L2 cache; waits for nothing."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r", [ptr.to(tl.uint64), num_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _stream_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    arrived_ptr,
    num_rows,
    num_outputs,
    x_stride,
    INPUTS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (tile of outputs, split). partial [splits, 1 or 2 planes, num_rows, num_outputs] float32."""
    PART: tl.constexpr = (INPUTS + SPLITS * TILE - 1) // (SPLITS * TILE) * TILE
    PLANES: tl.constexpr = 2 if GATED else 1
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    split = tl.program_id(1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    place = tl.minimum(output, num_outputs - 1)[:, None] * INPUTS
    if PDL:
        num_bytes = tl.minimum(PART, INPUTS - split * PART) * 2
        _prefetch(weight_ptr + place + split * PART, num_bytes)
        if GATED:
            _prefetch(weight_ptr + num_outputs * INPUTS + place + split * PART, num_bytes)
        tl.extra.cuda.gdc_wait()
    index = tl.arange(0, ROWS)
    row = tl.minimum(index, num_rows - 1)[:, None] * x_stride
    first = tl.zeros([ROWS, OUTPUTS], tl.float32)
    second = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in range(split * PART, tl.minimum(split * PART + PART, INPUTS), TILE):
        col = start + tl.arange(0, TILE)[None, :]
        if INPUTS % TILE == 0:
            x = tl.load(x_ptr + row + col)
            w = tl.load(weight_ptr + place + col)
        else:
            x = tl.load(x_ptr + row + col, mask=col < INPUTS, other=0.0)
            w = tl.load(weight_ptr + place + col, mask=col < INPUTS, other=0.0)
        first = tl.dot(x, tl.trans(w), first)
        if GATED:
            up_ptr = weight_ptr + num_outputs * INPUTS + place + col
            if INPUTS % TILE == 0:
                w = tl.load(up_ptr)
            else:
                w = tl.load(up_ptr, mask=col < INPUTS, other=0.0)
            second = tl.dot(x, tl.trans(w), second)

    valid = (output < num_outputs)[None, :]
    mask = valid & (index < num_rows)[:, None]
    out_offset = index[:, None] * num_outputs + output[None, :]
    last = True
    if SPLITS > 1:
        plane = num_rows * num_outputs
        own_ptr = partial_ptr + split * PLANES * plane + out_offset
        tl.store(own_ptr, first, mask=mask)
        if GATED:
            tl.store(own_ptr + plane, second, mask=mask)
        tl.debug_barrier()  # every warp's stores come before the one thread's release
        counter_ptr = arrived_ptr + tl.program_id(0)
        last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(counter_ptr, 0)
            first = tl.zeros([ROWS, OUTPUTS], tl.float32)
            second = tl.zeros([ROWS, OUTPUTS], tl.float32)
            # Other multiprocessors wrote these: .cg reads past this one's L1 cache.
            for i in tl.static_range(SPLITS):
                part_ptr = partial_ptr + i * PLANES * plane + out_offset
                first += tl.load(part_ptr, mask=mask, other=0.0, cache_modifier=".cg")
                if GATED:
                    second += tl.load(part_ptr + plane, mask=mask, other=0.0, cache_modifier=".cg")
    if last:
        result = _finish(
            first, second, bias_ptr, output[None, :], valid, num_outputs, out_ptr.dtype.element_ty, GATED, BIAS
        )
        tl.store(out_ptr + out_offset, result, mask=mask)


# --- from tensors to kernels ---------------------------------------------------------------


def small_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: Config, gated: bool = False
) -> Tensor:
    """`small_linear.small_linear`, or `gated_linear` if gated, in the kernel of `config`, which `choose` gave."""
    num_outputs, num_inputs = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    out = torch.empty((x.shape[0], num_outputs), dtype=x.dtype, device=x.device)
    if not isinstance(config, StreamConfig):
        _launch(x, None, None, 0.0, weight, bias, out, None, config, gated)
        return out
    columns = triton.cdiv(num_outputs, config.outputs)
    partial = arrived = None
    if config.splits > 1:
        shape = (config.splits, 2 if gated else 1, x.shape[0], num_outputs)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        arrived = _arrival_counters(x.device)
    pdl = has_dependent_launch(x.device)
    _stream_kernel[(columns, config.splits)](
        x, weight, bias, out, partial, arrived, x.shape[0], num_outputs, x.stride(0),
        INPUTS=num_inputs, GATED=gated, BIAS=bias is not None, ROWS=max(16, triton.next_power_of_2(x.shape[0])),
        OUTPUTS=config.outputs, TILE=config.inputs, SPLITS=config.splits, PDL=pdl,
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    return out


def rms_norm_linear_triton(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    config: Config,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:
    """`small_linear.rms_norm_linear`, or `rms_norm_gated_linear` if gated; `choose` gives no StreamConfig for it."""
    out = torch.empty((x.shape[0], weight.shape[0] // (2 if gated else 1)), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, norm_weight, eps, weight, bias, out, total, config, gated)
    return out, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    config: Config,
    gated: bool,
) -> None:
    assert not isinstance(config, StreamConfig)
    num_rows, num_outputs = out.shape
    pdl = has_dependent_launch(x.device)
    grid = (triton.cdiv(num_outputs, config.outputs),)
    residual_stride = 0 if residual is None else residual.stride(0)
    constants = {
        "INPUTS": weight.shape[1], "NORM": norm_weight is not None, "ADD": residual is not None, "GATED": gated,
        "BIAS": bias is not None, "OUTPUTS": config.outputs, "AHEAD": config.ahead, "PDL": pdl,
        "num_warps": config.num_warps, "launch_pdl": pdl,
    }  # fmt: skip
    if isinstance(config, TileConfig):
        _tile_kernel[grid](
            x, residual, norm_weight, weight, bias, out, total, num_rows, num_outputs, x.stride(0), residual_stride, eps,
            ROWS=max(8, triton.next_power_of_2(num_rows)), CHUNK=config.chunk, SLICES=config.slices, **constants,
        )  # fmt: skip
    else:
        _vector_kernel[grid](
            x, residual, norm_weight, weight, bias, out, total, num_outputs, x.stride(0), residual_stride, eps,
            ROWS=num_rows, CHUNK=256, **constants,
        )  # fmt: skip


@lru_cache
def _arrival_counters(device: torch.device) -> Tensor:
    """Programs that have left their part of a sum: 0 between calls. Calls that share a device follow one another."""
    return torch.zeros(MAX_COLUMNS_OF_SPLITS, dtype=torch.int32, device=device)
