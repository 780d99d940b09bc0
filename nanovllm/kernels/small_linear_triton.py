"""Triton twin of `small_linear.py`: two kernels for up to 64 rows, and the choice between them and cuBLAS.

Owns how few rows are multiplied on a GPU. A decode step reads every weight once and computes little, so what counts is
that the reading never pauses, not even from one kernel to the next: each program asks for its weights before it waits
for the kernel ahead (`dependent_launch`). Invariant: sums are added in an order that the sizes alone determine.

    rows      kernel     product
    1 .. 4    vector     multiply and add, a lane along the inputs
    5 .. 8    tile       matrix unit, warps split the inputs
    9 .. 64   tile       matrix unit, programs split the inputs

The norm needs all of a row before its first product; every program computes it, from rows that are few enough to hold.
Programs that split the inputs leave their sums in memory, and count themselves in `arrived`: see `new_arrived`.
"""

# Tuples of tiles grow while a kernel is compiled.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.dependent_launch import has_dependent_launch

MAX_ROWS = 64
MAX_SPLITS = 12
MAX_SPLIT_WEIGHTS = 6 * 2**20
MAX_OUTPUTS = 65536  # wider is a language-model head, which runs at the memory's speed anyway


@dataclass(frozen=True)
class VectorConfig:
    """outputs: per program. chunk: inputs per step, 256 for each warp that shares an output with others.

    ahead: weights that a thread holds, in loads of 16 bytes per output of the thread.
    """

    outputs: int
    num_warps: int
    ahead: int
    chunk: int = 256


@dataclass(frozen=True)
class TileConfig:
    """outputs: per program. splits: parts of the inputs, each for a program of its own; equal, and multiples of 16.

    chunk: inputs per step. slices: parts of a chunk, a warp or more for each.
    ahead, x_ahead: chunks of weights and of x that are held.
    """

    outputs: int
    num_warps: int
    slices: int
    chunk: int
    ahead: int
    x_ahead: int
    splits: int = 1


Config = VectorConfig | TileConfig


def choose(x: Tensor, weight: Tensor, gated: bool = False, normed: bool = False) -> Config | None:
    """The kernel for x [num_rows, in_features] and weight [out_features, in_features]; None: leave it to cuBLAS.

    Looks at sizes, strides, dtypes and alignment only; any of them that no kernel is made for goes to cuBLAS, too.
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
        or weight.shape[0] > MAX_OUTPUTS
        or weight.numel() >= 2**31
    ):
        return None
    return choose_by_size(num_rows, num_outputs, num_inputs, gated, normed)


def choose_by_size(num_rows: int, num_outputs: int, num_inputs: int, gated: bool, normed: bool) -> Config | None:
    """See `choose`; num_outputs counts what comes out, so half the weight's rows if gated.

    The rules are what sweeps over the layers of a 0.6B and an 8B model on an H200 and an H100 found fastest. The norm
    is worth repeating in every program only while rows are short and few: at 4,096 inputs, or for more than 8 rows, a
    kernel of its own is faster.
    """
    if normed and triton.next_power_of_2(num_rows) * num_inputs > (2048 if num_rows <= 4 else 8192):
        return None
    if num_rows == 1 and num_inputs > 4096:
        return VectorConfig(outputs=4, num_warps=8, ahead=2, chunk=2048)
    if num_rows <= 4:
        return _vector_config(num_rows, num_outputs, num_inputs, 2 if gated else 1) if num_inputs <= 4096 else None
    if num_rows <= 8:
        return _sliced_config(num_inputs, gated)
    return None if normed else _split_config(num_rows, num_outputs, num_inputs, gated)


def _vector_config(num_rows: int, num_outputs: int, num_inputs: int, planes: int) -> VectorConfig:
    chunks = triton.cdiv(num_inputs, 256)
    # As many outputs per warp as there are registers for their weights, as long as all multiprocessors have work.
    loads = 16 if num_rows == 1 else 8
    per_warp = 1
    while per_warp * 2 * chunks * planes <= loads and num_outputs // (per_warp * 2 * 4) >= 256:
        per_warp *= 2
    # One row leaves registers for twice as many weights: 4.27 ms a step of the 8B shape in place of 4.55.
    ahead = 16 // per_warp if num_rows == 1 else 16 // (per_warp * planes)
    return VectorConfig(outputs=4 * per_warp, num_warps=4, ahead=ahead)


def _sliced_config(num_inputs: int, gated: bool) -> TileConfig | None:
    """5 to 8 rows: warps split the inputs."""
    if num_inputs <= 1024:
        return TileConfig(outputs=16, num_warps=4, slices=4, chunk=256, ahead=4, x_ahead=4)
    if num_inputs <= 2048:
        return TileConfig(outputs=16, num_warps=8, slices=8, chunk=1024, ahead=1 if gated else 2, x_ahead=1)
    if num_inputs <= 3072:
        return TileConfig(outputs=16, num_warps=8, slices=8, chunk=512, ahead=3 if gated else 6, x_ahead=1)
    return None if gated else TileConfig(outputs=16, num_warps=8, slices=8, chunk=512, ahead=4, x_ahead=2)


def _split_config(num_rows: int, num_outputs: int, num_inputs: int, gated: bool) -> TileConfig | None:
    """9 to 64 rows: programs split the inputs, a chunk for each, so that all weights are on their way at once. Larger
    matrices keep every multiprocessor busy as they are, and so do short inputs the more rows there are.
    """
    is_short = num_inputs < 2048
    if num_outputs * num_inputs * (2 if gated else 1) > MAX_SPLIT_WEIGHTS:
        return None
    if is_short and num_rows > (32 if gated else 16):
        return None
    span = 256 if is_short and (num_rows > 16 or not gated) else 512
    splits = max(1, min(num_inputs // span, MAX_SPLITS))
    while num_inputs % (16 * splits):
        splits -= 1
    num_warps = 4 if span == 256 and not gated else 8
    return TileConfig(outputs=64, num_warps=num_warps, slices=1, chunk=span, ahead=1, x_ahead=1, splits=splits)


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
def _finish(
    first, second, bias_ptr, output, mask, num_outputs, dtype,
    GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """From float32 sums to what is stored: bias, rounding, gate. `output`, `mask`: which outputs these are."""
    if BIAS:
        first += tl.load(bias_ptr + output, mask=mask, other=0.0).to(tl.float32)
    result = first.to(dtype)
    if GATED:
        if BIAS:
            second += tl.load(bias_ptr + num_outputs + output, mask=mask, other=0.0).to(tl.float32)
        gate = result.to(tl.float32)
        slope = gate
        if GELU:  # as in silu_and_mul_triton
            slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        active = (gate / (1.0 + tl.exp(-slope))).to(dtype).to(tl.float32)
        result = (active * second.to(dtype).to(tl.float32)).to(dtype)
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
    GELU: tl.constexpr,
    BIAS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SHARED: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Every tile of weights is [OUTPUTS, CHUNK], and a chunk one load per lane. Short inputs: a warp has whole outputs
    to itself, no data passes between warps, and a row of x is repeated for each output, so that all lies where the
    weights do. Long inputs: warps share outputs and lie along the chunk, and so does a row of x as it is (SHARED = 1).
    """
    CHUNKS: tl.constexpr = (INPUTS + CHUNK - 1) // CHUNK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    col = tl.arange(0, CHUNK)[None, :]
    place = tl.minimum(output, num_outputs - 1)[:, None] * INPUTS
    repeat = tl.zeros([SHARED, 1], tl.int32)
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
            squares = tl.zeros([SHARED, CHUNK], tl.float32)
            for i in tl.static_range(CHUNKS):
                x = _load(x_ptr, r * x_stride + repeat, col, i, INPUTS, CHUNK)
                if ADD:
                    x = _add(x, _load(residual_ptr, r * residual_stride + repeat, col, i, INPUTS, CHUNK))
                totals = totals + (x,)
                squares += x.to(tl.float32) * x.to(tl.float32)
            scales = scales + (tl.rsqrt(tl.sum(squares, axis=1) / INPUTS + eps)[:, None],)
    if ADD:
        # Every program holds every row; the first program writes them.
        written = (tl.arange(0, SHARED) == 0)[:, None] & (tl.program_id(0) == 0)
        for r in tl.static_range(ROWS):
            for i in tl.static_range(CHUNKS):
                mask = written & (col < INPUTS - i * CHUNK)
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
            output, valid, num_outputs, out_ptr.dtype.element_ty, GATED, GELU, BIAS,
        )  # fmt: skip
        tl.store(out_ptr + r * num_outputs + output, result, mask=valid)


# --- 5 to 64 rows -------------------------------------------------------------------------


@triton.jit
def _sliced_product(acc, w, x, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SLICES: tl.constexpr, CHUNK: tl.constexpr):
    """acc [SLICES, OUTPUTS, ROWS] += w [OUTPUTS, CHUNK] x^T [CHUNK, ROWS], each slice of the chunk by itself.

    With one slice there is no first dimension.
    """
    if SLICES == 1:
        return tl.dot(w, tl.trans(x), acc)
    else:
        w = tl.permute(tl.reshape(w, [OUTPUTS, SLICES, CHUNK // SLICES]), [1, 0, 2])
        x = tl.permute(tl.reshape(x, [ROWS, SLICES, CHUNK // SLICES]), [1, 2, 0])
        return tl.dot(w, x, acc)


@triton.jit
def _sum_in_order(ptr, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """The parts that other multiprocessors wrote: .cg reads past this one's L1 cache."""
    total = tl.load(ptr, cache_modifier=".cg")
    for i in tl.static_range(1, PARTS):
        total += tl.load(ptr + i * STRIDE, cache_modifier=".cg")
    return total


@triton.jit
def _store_tile(
    first, second, bias_ptr, out_ptr, output, index, num_rows, num_outputs,
    GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    valid = (output < num_outputs)[:, None]
    dtype = out_ptr.dtype.element_ty
    result = _finish(first, second, bias_ptr, output[:, None], valid, num_outputs, dtype, GATED, GELU, BIAS)
    mask = valid & (index < num_rows)[None, :]
    tl.store(out_ptr + index[None, :] * num_outputs + output[:, None], result, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _tile_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    part_ptr,
    arrived_ptr,
    num_rows,
    num_outputs,
    x_stride,
    residual_stride,
    eps,
    INPUTS: tl.constexpr,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    X_AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """The weights are the left operand: few rows fill the matrix unit, which takes outputs by 16 or 64 and rows by 8.

    A program has OUTPUTS outputs and one of SPLITS equal parts of the inputs. It leaves its sums; whoever is last to
    leave some for these outputs adds them up, in the order of the inputs.
    """
    SPAN: tl.constexpr = INPUTS // SPLITS
    CHUNKS: tl.constexpr = (SPAN + CHUNK - 1) // CHUNK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0) // SPLITS
    begin = tl.program_id(0) % SPLITS * SPAN
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    col = tl.arange(0, CHUNK)[None, :]
    place = tl.minimum(output, num_outputs - 1)[:, None] * INPUTS + begin
    up_ptr = weight_ptr + num_outputs * INPUTS
    index = tl.arange(0, ROWS)
    row = tl.minimum(index, num_rows - 1)[:, None]
    weights = ()
    up_weights = ()
    norm_weights = ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        weights = weights + (_load(weight_ptr, place, col, i, SPAN, CHUNK),)
        if GATED:
            up_weights = up_weights + (_load(up_ptr, place, col, i, SPAN, CHUNK),)
    if NORM:
        for i in tl.static_range(CHUNKS):
            norm_weights = norm_weights + (_load(norm_weight_ptr, row * 0, col, i, SPAN, CHUNK),)
    if PDL:
        tl.extra.cuda.gdc_wait()

    x_offset = row * x_stride + begin
    xs = ()
    for i in tl.static_range(CHUNKS if NORM else min(X_AHEAD, CHUNKS)):
        xs = xs + (_load(x_ptr, x_offset, col, i, SPAN, CHUNK),)
    if NORM:
        totals = ()
        squares = tl.zeros([ROWS, CHUNK], tl.float32)
        for i in tl.static_range(CHUNKS):
            if ADD:
                residual = _load(residual_ptr, row * residual_stride, col, i, SPAN, CHUNK)
                totals = totals + (_add(xs[i], residual),)
            else:
                totals = totals + (xs[i],)
            squares += totals[i].to(tl.float32) * totals[i].to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, axis=1) / INPUTS + eps)[:, None]
        xs = ()
        for i in tl.static_range(CHUNKS):
            xs = xs + (_normalize(totals[i], scale, norm_weights[i]),)
    if SLICES == 1:
        first = tl.zeros([OUTPUTS, ROWS], tl.float32)
    else:
        first = tl.zeros([SLICES, OUTPUTS, ROWS], tl.float32)
    second = first
    for i in tl.static_range(CHUNKS):
        first = _sliced_product(first, weights[i], xs[i], ROWS, OUTPUTS, SLICES, CHUNK)
        if GATED:
            second = _sliced_product(second, up_weights[i], xs[i], ROWS, OUTPUTS, SLICES, CHUNK)
        # Only now are there registers for another chunk.
        if i + AHEAD < CHUNKS:
            weights = weights + (_load(weight_ptr, place, col, i + AHEAD, SPAN, CHUNK),)
            if GATED:
                up_weights = up_weights + (_load(up_ptr, place, col, i + AHEAD, SPAN, CHUNK),)
        if not NORM and i + X_AHEAD < CHUNKS:
            xs = xs + (_load(x_ptr, x_offset, col, i + X_AHEAD, SPAN, CHUNK),)
    if SLICES > 1:
        first = tl.sum(first, axis=0)
        second = tl.sum(second, axis=0)

    if ADD:
        # Every program holds every row; the first program writes them.
        written = (index < num_rows)[:, None] & (tl.program_id(0) == 0)
        for i in tl.static_range(CHUNKS):
            mask = written & (col < INPUTS - i * CHUNK)
            tl.store(total_ptr + index[:, None] * INPUTS + i * CHUNK + col, totals[i], mask=mask)
    if SPLITS == 1:
        _store_tile(first, second, bias_ptr, out_ptr, output, index, num_rows, num_outputs, GATED, GELU, BIAS)
    else:
        SIZE: tl.constexpr = OUTPUTS * ROWS
        PART: tl.constexpr = SIZE * 2 if GATED else SIZE
        tile_part_ptr = part_ptr + tile * (SPLITS * PART) + tl.arange(0, OUTPUTS)[:, None] * ROWS + index[None, :]
        my_part_ptr = tile_part_ptr + tl.program_id(0) % SPLITS * PART
        tl.store(my_part_ptr, first)
        if GATED:
            tl.store(my_part_ptr + SIZE, second)
        tl.debug_barrier()  # every warp's stores come before the one thread's release
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrived_ptr + tile, 0)
            first = _sum_in_order(tile_part_ptr, SPLITS, PART)
            if GATED:
                second = _sum_in_order(tile_part_ptr + SIZE, SPLITS, PART)
            _store_tile(first, second, bias_ptr, out_ptr, output, index, num_rows, num_outputs, GATED, GELU, BIAS)


# --- from tensors to kernels ---------------------------------------------------------------


def new_arrived(device: torch.device) -> Tensor:
    """Counters for split sums, one for each group of outputs, 0 between calls. Calls in one stream may share them."""
    return torch.zeros(MAX_OUTPUTS // 16, dtype=torch.int32, device=device)


def small_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: Config,
    gated: bool = False,
    gelu: bool = False,
    arrived: Tensor | None = None,
) -> Tensor:
    """`small_linear.small_linear`, or `gated_linear` if gated, in the kernel of `config`, which `choose` gave.

    arrived: `new_arrived`'s; without it a config with splits makes and clears some, a kernel more.
    """
    out = torch.empty((x.shape[0], weight.shape[0] // (2 if gated else 1)), dtype=x.dtype, device=x.device)
    _launch(x, None, None, 0.0, weight, bias, out, None, config, gated, gelu, arrived)
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
    gelu: bool = False,
    arrived: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`small_linear.rms_norm_linear`, or `rms_norm_gated_linear` if gated."""
    out = torch.empty((x.shape[0], weight.shape[0] // (2 if gated else 1)), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, norm_weight, eps, weight, bias, out, total, config, gated, gelu, arrived)
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
    gelu: bool,
    arrived: Tensor | None,
) -> None:
    num_rows, num_outputs = out.shape
    pdl = has_dependent_launch(x.device)
    num_tiles = triton.cdiv(num_outputs, config.outputs)
    residual_stride = 0 if residual is None else residual.stride(0)
    constants = {
        "INPUTS": weight.shape[1], "NORM": norm_weight is not None, "ADD": residual is not None, "GATED": gated,
        "GELU": gelu, "BIAS": bias is not None, "OUTPUTS": config.outputs, "CHUNK": config.chunk,
        "AHEAD": config.ahead, "PDL": pdl, "num_warps": config.num_warps, "launch_pdl": pdl,
    }  # fmt: skip
    if isinstance(config, TileConfig):
        rows = max(8, triton.next_power_of_2(num_rows))
        parts = None
        if config.splits > 1:
            size = num_tiles * config.splits * (2 if gated else 1) * config.outputs * rows
            parts = torch.empty(size, dtype=torch.float32, device=x.device)
            arrived = new_arrived(x.device) if arrived is None else arrived
        _tile_kernel[(num_tiles * config.splits,)](
            x, residual, norm_weight, weight, bias, out, total, parts, arrived, num_rows, num_outputs,
            x.stride(0), residual_stride, eps,
            ROWS=rows, SLICES=config.slices, SPLITS=config.splits, X_AHEAD=config.x_ahead,
            **constants,
        )  # fmt: skip
    else:
        _vector_kernel[(num_tiles,)](
            x, residual, norm_weight, weight, bias, out, total, num_outputs, x.stride(0), residual_stride, eps,
            ROWS=num_rows, SHARED=config.outputs if config.chunk == 256 else 1, **constants,
        )  # fmt: skip
