"""Skinny GEMM in Triton: products of 2 to 64 rows on the matrix unit, sliced-K for few rows, split-K for more.

Owns that kernel and its shape; which products it is for is `skinny_linear.py`'s to say. Sliced-K: the warps of a
program split the inputs. Split-K: programs do, leave their sums in memory, and count themselves in `semaphores` (see
`new_semaphores`). Invariant: the parts of a sum are added up in the order of the inputs, whoever was last.
"""

# Tuples of tiles grow while a kernel is compiled.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2
from nanovllm.kernels.triton.linear.parts import add_residual, finish, load_chunk, normalize

MAX_TILES = 4096  # of outputs, in one product whose inputs are split


@dataclass(frozen=True)
class GemmConfig:
    """outputs: per program; gates and ups together where a gated product has 1 slice, pairs of them where it has more.

    splits: parts of the inputs, each for a program of its own; equal, and multiples of 16; 1 if there are slices.
    chunk: inputs per step. slices: parts of a chunk, a warp or more for each.
    ahead, x_ahead: chunks of weights and of x that are held. fewest_rows: what is missing is computed for nothing.
    """

    outputs: int
    num_warps: int
    slices: int
    chunk: int
    ahead: int
    x_ahead: int
    splits: int = 1
    fewest_rows: int = 8


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
def sum_in_order(ptr, PARTS: tl.constexpr, STRIDE: tl.constexpr):
    """The parts that other multiprocessors wrote: .cg reads past this one's L1 cache."""
    total = tl.load(ptr, cache_modifier=".cg")
    for i in tl.static_range(1, PARTS):
        total += tl.load(ptr + i * STRIDE, cache_modifier=".cg")
    return total


@triton.jit
def _store_tile(
    first, second, bias_ptr, out_ptr, tile, num_rows, num_outputs,
    GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr,
    JOINED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """JOINED: gates and ups are the two halves of first [OUTPUTS, ROWS]."""
    OWN: tl.constexpr = OUTPUTS // 2 if JOINED else OUTPUTS
    if JOINED:
        first, second = tl.split(tl.permute(tl.reshape(first, [2, OWN, ROWS]), [1, 2, 0]))
    output = tile * OWN + tl.arange(0, OWN)
    index = tl.arange(0, ROWS)
    valid = (output < num_outputs)[:, None]
    dtype = out_ptr.dtype.element_ty
    result = finish(first, second, bias_ptr, output[:, None], valid, num_outputs, dtype, GATED, GELU, BIAS)
    mask = valid & (index < num_rows)[None, :]
    tl.store(out_ptr + index[None, :] * num_outputs + output[:, None], result, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _gemm_kernel(
    x_ptr,
    residual_ptr,
    norm_weight_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    total_ptr,
    part_ptr,
    semaphores_ptr,
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
    JOINED: tl.constexpr = GATED and SLICES == 1  # gates and ups are rows of one operand
    PAIRED: tl.constexpr = GATED and SLICES > 1  # they are two
    OWN: tl.constexpr = OUTPUTS // 2 if JOINED else OUTPUTS
    SPAN: tl.constexpr = INPUTS // SPLITS
    CHUNKS: tl.constexpr = (SPAN + CHUNK - 1) // CHUNK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0) // SPLITS
    begin = tl.program_id(0) % SPLITS * SPAN
    output = tile * OWN + tl.arange(0, OUTPUTS) % OWN
    col = tl.arange(0, CHUNK)[None, :]
    weight_row = tl.minimum(output, num_outputs - 1)
    if JOINED:
        weight_row += tl.arange(0, OUTPUTS) // OWN * num_outputs
    place = weight_row[:, None] * INPUTS + begin
    up_ptr = weight_ptr + num_outputs * INPUTS
    index = tl.arange(0, ROWS)
    row = tl.minimum(index, num_rows - 1)[:, None]
    weights = ()
    up_weights = ()
    norm_weights = ()
    for i in tl.static_range(min(AHEAD, CHUNKS)):
        weights = weights + (load_chunk(weight_ptr, place, col, i, SPAN, CHUNK),)
        if PAIRED:
            up_weights = up_weights + (load_chunk(up_ptr, place, col, i, SPAN, CHUNK),)
    if NORM:
        for i in tl.static_range(CHUNKS):
            norm_weights = norm_weights + (load_chunk(norm_weight_ptr, row * 0, col, i, SPAN, CHUNK),)
    if PDL:
        tl.extra.cuda.gdc_wait()

    x_offset = row * x_stride + begin
    xs = ()
    for i in tl.static_range(CHUNKS if NORM else min(X_AHEAD, CHUNKS)):
        xs = xs + (load_chunk(x_ptr, x_offset, col, i, SPAN, CHUNK),)
    if NORM:
        totals = ()
        squares = tl.zeros([ROWS, CHUNK], tl.float32)
        for i in tl.static_range(CHUNKS):
            if ADD:
                residual = load_chunk(residual_ptr, row * residual_stride, col, i, SPAN, CHUNK)
                totals = totals + (add_residual(xs[i], residual),)
            else:
                totals = totals + (xs[i],)
            squares += totals[i].to(tl.float32) * totals[i].to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, axis=1) / INPUTS + eps)[:, None]
        xs = ()
        for i in tl.static_range(CHUNKS):
            xs = xs + (normalize(totals[i], scale, norm_weights[i]),)
    if SLICES == 1:
        first = tl.zeros([OUTPUTS, ROWS], tl.float32)
    else:
        first = tl.zeros([SLICES, OUTPUTS, ROWS], tl.float32)
    second = first
    for i in tl.static_range(CHUNKS):
        first = _sliced_product(first, weights[i], xs[i], ROWS, OUTPUTS, SLICES, CHUNK)
        if PAIRED:
            second = _sliced_product(second, up_weights[i], xs[i], ROWS, OUTPUTS, SLICES, CHUNK)
        # Only now are there registers for another chunk.
        if i + AHEAD < CHUNKS:
            weights = weights + (load_chunk(weight_ptr, place, col, i + AHEAD, SPAN, CHUNK),)
            if PAIRED:
                up_weights = up_weights + (load_chunk(up_ptr, place, col, i + AHEAD, SPAN, CHUNK),)
        if not NORM and i + X_AHEAD < CHUNKS:
            xs = xs + (load_chunk(x_ptr, x_offset, col, i + X_AHEAD, SPAN, CHUNK),)
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
        _store_tile(
            first, second, bias_ptr, out_ptr, tile, num_rows, num_outputs, GATED, GELU, BIAS, JOINED, ROWS, OUTPUTS
        )
    else:
        PART: tl.constexpr = OUTPUTS * ROWS
        tile_part_ptr = part_ptr + tile * (SPLITS * PART) + tl.arange(0, OUTPUTS)[:, None] * ROWS + index[None, :]
        tl.store(tile_part_ptr + tl.program_id(0) % SPLITS * PART, first)
        tl.debug_barrier()  # every warp's stores come before the one thread's release
        if tl.atomic_add(semaphores_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(semaphores_ptr + tile, 0)
            first = sum_in_order(tile_part_ptr, SPLITS, PART)
            _store_tile(
                first, second, bias_ptr, out_ptr, tile, num_rows, num_outputs, GATED, GELU, BIAS, JOINED, ROWS, OUTPUTS
            )


def new_semaphores(device: torch.device) -> Tensor:
    """Counters for split sums, one for each tile of outputs, 0 between calls. Calls in one stream may share them."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def launch_gemm(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    config: GemmConfig,
    gated: bool,
    gelu: bool,
    semaphores: Tensor | None,
) -> None:
    """Writes out [num_rows, outputs], and x + residual into total if there is a residual.

    semaphores: `new_semaphores`'s; without it a config with splits makes and clears some, a kernel more.
    """
    assert config.splits == 1 or config.slices == 1, "the kernel adds up one operand's parts"
    num_rows, num_outputs = out.shape
    is_joined = gated and config.slices == 1
    num_tiles = cdiv(num_outputs, config.outputs // 2 if is_joined else config.outputs)
    rows = max(config.fewest_rows, next_power_of_2(num_rows))
    parts = None
    if config.splits > 1:
        size = num_tiles * config.splits * config.outputs * rows
        parts = torch.empty(size, dtype=torch.float32, device=x.device)
        semaphores = new_semaphores(x.device) if semaphores is None else semaphores
    launch(
        _gemm_kernel, (num_tiles * config.splits,), x.device,
        x, residual, norm_weight, weight, bias, out, total, parts, semaphores, num_rows, num_outputs,
        x.stride(0), 0 if residual is None else residual.stride(0), eps,
        INPUTS=weight.shape[1], NORM=norm_weight is not None, ADD=residual is not None, GATED=gated, GELU=gelu,
        BIAS=bias is not None, ROWS=rows, OUTPUTS=config.outputs, SLICES=config.slices, SPLITS=config.splits,
        CHUNK=config.chunk, AHEAD=config.ahead, X_AHEAD=config.x_ahead, num_warps=config.num_warps,
    )  # fmt: skip
