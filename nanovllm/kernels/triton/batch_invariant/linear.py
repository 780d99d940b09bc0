"""Batch-invariant linear in Triton: the inner dimension is added in one order for every number of rows.

Owns the tiles and the spans. Invariant: a row's result depends on that row and the weight alone, to the bit. The weight
alone says into how many spans the inner dimension is cut. In each, 16 elements after the other are added to what there
is, from the first to the last, by one kind of instruction, whose rows and columns do not know of each other; then the
spans are added up in float32, from the first to the last. (An instruction of Hopper's takes 64 on one side, so no tile
has fewer there.) Tiles differ with the number of rows, and so does who computes the spans: one program after the other,
or each a program of its own, and whoever is last adds up.

    rows         product
    .. 64        `linear/skinny_gemm.py`, whose programs hold their weights before they wait; wide ones here
    .. 512       here, a program for each span: there are few tiles
    more         here
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.triton.common.device_limits import has_large_shared_memory
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv
from nanovllm.kernels.triton.linear.skinny_gemm import GemmConfig, launch_gemm, new_semaphores, sum_in_order


class Tiles(NamedTuple):
    """Rows and columns of a program's result, and its pipeline."""

    rows: int
    cols: int
    num_stages: int
    num_warps: int


FEW_ROWS, MIDDLE_ROWS, SHARED_ROWS, SOME_ROWS = 64, 256, 512, 1024
DEPTH = 64  # elements of the inner dimension at a time
FEW = Tiles(rows=64, cols=32, num_stages=8, num_warps=4)  # many programs, many bytes on their way, two at a time
WIDE = Tiles(rows=64, cols=128, num_stages=6, num_warps=8)  # few rows, and columns for several programs each
MIDDLE = Tiles(rows=64, cols=128, num_stages=5, num_warps=4)
SOME = Tiles(rows=128, cols=128, num_stages=4, num_warps=8)
MANY = Tiles(rows=128, cols=128, num_stages=3, num_warps=8)  # two at a time
SMALL = Tiles(rows=64, cols=64, num_stages=3, num_warps=4)  # where shared memory is small; and float32
LINE = tl.constexpr(128)  # bytes of a line of the cache
BAND = 8  # tiles of rows that use a weight one after the other, while the cache has it

# Spans: none where inputs are short enough to be held, or where there are columns enough for all multiprocessors.
MAX_HELD_INPUTS, SPAN, MAX_SPANS = 1024, 512, 12
MAX_WEIGHTS = 6 * 2**20
MAX_OUTPUTS = 65536  # wider is a language-model head, which holding keeps from reading without a pause


def num_spans(x: Tensor, weight: Tensor) -> int:
    """Of x only dtype and device count."""
    out_features, in_features = weight.shape
    if in_features <= MAX_HELD_INPUTS or out_features * in_features > MAX_WEIGHTS or not _is_roomy(x):
        return 1
    fewest = cdiv(in_features, SPAN)
    return next((n for n in range(fewest, MAX_SPANS + 1) if in_features % (DEPTH * n) == 0), 1)


def is_skinny(x: Tensor, weight: Tensor) -> bool:
    """Is it a product for `skinny_gemm.py`? There, a gate behind it is part of it."""
    out_features, in_features = weight.shape
    is_held = in_features // num_spans(x, weight) <= MAX_HELD_INPUTS
    return 0 < x.shape[0] <= FEW_ROWS and out_features <= MAX_OUTPUTS and is_held and _is_roomy(x)


def _is_roomy(x: Tensor) -> bool:
    return x.dtype != torch.float32 and has_large_shared_memory(x.device)


def _skinny_config(in_features: int, spans: int) -> GemmConfig:
    """Shapes of `skinny_linear.py`'s; with fewer rows, the compiler would choose another instruction."""
    chunk, num_warps = (256, 4) if spans == 1 else (512, 8)
    held = cdiv(in_features // spans, chunk)
    return GemmConfig(64, num_warps, slices=1, chunk=chunk, ahead=held, x_ahead=1, splits=spans, fewest_rows=16)


def _choose_tiles(x: Tensor, out_features: int, spans: int) -> Tiles:
    num_rows = x.shape[0]
    if not _is_roomy(x):
        return SMALL
    if num_rows <= FEW_ROWS:
        return WIDE if out_features > MAX_OUTPUTS else FEW
    if num_rows <= MIDDLE_ROWS:
        return MIDDLE
    return SOME if num_rows <= SOME_ROWS or spans > 1 else MANY


@triton.jit
def _fetch_weights(weight_ptr, col, IN_FEATURES: tl.constexpr):
    """Ask for the lines of these rows of the weight, and wait for none."""
    SIZE: tl.constexpr = LINE // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = triton.next_power_of_2((IN_FEATURES + SIZE - 1) // SIZE)
    inner = tl.minimum(tl.arange(0, LINES) * SIZE, IN_FEATURES - 1)
    line_ptr = weight_ptr + col.to(tl.int64)[:, None] * IN_FEATURES + inner[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line_ptr], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["num_rows"])
def _batch_invariant_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    part_ptr,
    semaphores_ptr,
    num_rows,
    x_stride,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    SPANS: tl.constexpr,
    SHARERS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """SHARERS: programs of a tile, 1 or SPANS."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    SPAN: tl.constexpr = IN_FEATURES // SPANS
    programs_of_band: tl.constexpr = BAND * tl.cdiv(OUT_FEATURES, TILE_COLS)
    tile, part = tl.program_id(0) // SHARERS, tl.program_id(0) % SHARERS
    band, in_band = tile // programs_of_band, tile % programs_of_band
    height = tl.minimum(tl.cdiv(num_rows, TILE_ROWS) - band * BAND, BAND)
    row = (band * BAND + in_band % height) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = in_band // height * TILE_COLS + tl.arange(0, TILE_COLS)
    inner = tl.arange(0, DEPTH)
    is_row = (row < num_rows)[:, None]
    x_ptr += row.to(tl.int64)[:, None] * x_stride + (part * SPAN + inner)[None, :]
    weight_row = tl.minimum(col, OUT_FEATURES - 1)  # columns outside are taken from the last one, and not stored
    if PDL and EARLY:
        _fetch_weights(weight_ptr, weight_row, IN_FEATURES)
    if PDL:
        tl.extra.cuda.gdc_wait()
    weight_ptr += weight_row.to(tl.int64)[:, None] * IN_FEATURES + (part * SPAN + inner)[None, :]
    acc = tl.zeros([TILE_ROWS, TILE_COLS], tl.float32)
    total = acc
    for start in range(0, IN_FEATURES // SHARERS, DEPTH):
        if IN_FEATURES % DEPTH == 0:
            x = tl.load(x_ptr + start, mask=is_row, other=0.0)
            weight = tl.load(weight_ptr + start)
        else:
            is_inside = (start + inner < IN_FEATURES)[None, :]
            x = tl.load(x_ptr + start, mask=is_row & is_inside, other=0.0)
            weight = tl.load(weight_ptr + start, mask=is_inside, other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
        if SPANS > SHARERS:  # noqa: SIM102 (known when it is compiled)
            if (start + DEPTH) % SPAN == 0:
                total += acc
                acc = tl.zeros([TILE_ROWS, TILE_COLS], tl.float32)
    if SPANS > SHARERS:
        acc = total
    is_last = True
    if SHARERS > 1:
        PART: tl.constexpr = TILE_ROWS * TILE_COLS
        tile_part_ptr = part_ptr + tile.to(tl.int64) * (SHARERS * PART)
        tile_part_ptr += tl.arange(0, TILE_ROWS)[:, None] * TILE_COLS + tl.arange(0, TILE_COLS)[None, :]
        tl.store(tile_part_ptr + part * PART, acc)
        tl.debug_barrier()  # every warp's stores come before the one thread's release
        is_last = tl.atomic_add(semaphores_ptr + tile, 1, sem="acq_rel") == SHARERS - 1
        if is_last:
            tl.store(semaphores_ptr + tile, 0)
            acc = sum_in_order(tile_part_ptr, SHARERS, PART)
    if is_last:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + col, mask=col < OUT_FEATURES, other=0.0).to(tl.float32)[None, :]
        place = row.to(tl.int64)[:, None] * OUT_FEATURES + col[None, :]
        mask = is_row & (col < OUT_FEATURES)[None, :]
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


def batch_invariant_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, semaphores: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """See the function without `_triton`; rows of x may be strided, its last dimension and the weight may not.

    activation: of a gate behind the product, where `is_skinny`.
    """
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    num_outputs = out_features if activation is None else out_features // 2
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    spans = num_spans(x, weight)
    if is_skinny(x, weight):
        config = _skinny_config(in_features, spans)
        is_gated, is_gelu = activation is not None, activation == "gelu_tanh"
        launch_gemm(x, None, None, 0.0, weight, bias, out, None, config, is_gated, is_gelu, semaphores)
        return out
    assert activation is None
    rows, cols, num_stages, num_warps = _choose_tiles(x, out_features, spans)
    num_tiles = cdiv(num_rows, rows) * cdiv(out_features, cols)
    sharers = spans if num_rows <= SHARED_ROWS else 1
    parts = None
    if sharers > 1:
        parts = torch.empty(num_tiles * sharers * rows * cols, dtype=torch.float32, device=x.device)
        semaphores = new_semaphores(x.device) if semaphores is None else semaphores
    launch(
        _batch_invariant_linear_kernel, (num_tiles * sharers,), x.device,
        x, weight, bias, out, parts, semaphores, num_rows, x.stride(0),
        OUT_FEATURES=out_features, IN_FEATURES=in_features, SPANS=spans, SHARERS=sharers,
        TILE_ROWS=rows, TILE_COLS=cols, DEPTH=DEPTH, BAND=BAND,
        EARLY=num_rows <= FEW_ROWS, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out
