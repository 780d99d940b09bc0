"""The row that a vector kernel multiplies by codes: as its lanes hold it, with residual, norm and rounding as prologue.

Owns where a row's inputs lie in registers: for each chunk of the row, a lane has those that meet its `WORDS` words of
codes, as tiles [LANES, WORDS], one for each place of a code in a word (PARTS). In memory they lie side by side; where
a word has eight codes, 16 are for the lower halves of the lane's bytes and 16 for the upper ones.
Invariant: values are rounded where the plain operations in sequence round.
"""

# Tuples of tiles grow while a kernel is compiled.
# mypy: disable-error-code="assignment, attr-defined, misc, var-annotated"

import triton
import triton.language as tl

from nanovllm.kernels.triton.linear.parts import add_residual, normalize, round_to_codes, scale_of_largest
from nanovllm.kernels.triton.linear.words import WORDS, dot_int8


@triton.jit
def _load_chunk(ptr, lane, INPUTS: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr):
    """PARTS tiles [LANES, WORDS]; in loads of 16 bytes, each of which has what meets two words."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    ptr = ptr.to(tl.pointer_type(tl.int32)) + lane[:, None] * (PARTS * 2) + tl.arange(0, WORDS)[None, :]
    mask = (lane < INPUTS // (PARTS * WORDS))[:, None]
    parts = ()
    for half in tl.static_range(PARTS // 4):
        even, odd = tl.split(tl.reshape(tl.load(ptr + half * 8, mask=mask, other=0), [LANES, 2, 2]))
        more_even, more_odd = tl.split(tl.reshape(tl.load(ptr + half * 8 + 4, mask=mask, other=0), [LANES, 2, 2]))
        first = tl.reshape(tl.permute(tl.join(even, more_even), (0, 2, 1)), [LANES, WORDS])
        second = tl.reshape(tl.permute(tl.join(odd, more_odd), (0, 2, 1)), [LANES, WORDS])
        parts = parts + (
            first.to(tl.int16).to(dtype, bitcast=True),
            (first >> 16).to(tl.int16).to(dtype, bitcast=True),
            second.to(tl.int16).to(dtype, bitcast=True),
            (second >> 16).to(tl.int16).to(dtype, bitcast=True),
        )
    return parts


@triton.jit
def load_row(ptr, CHUNKS: tl.constexpr, INPUTS: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr):
    """CHUNKS * PARTS tiles; behind the last input there are zeros."""
    row = ()
    for i in tl.static_range(CHUNKS):
        row = row + _load_chunk(ptr, tl.arange(0, LANES) + i * LANES, INPUTS, LANES, PARTS)
    return row


@triton.jit
def store_row(ptr, row, CHUNKS: tl.constexpr, INPUTS: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr):
    word = tl.arange(0, WORDS)[None, :]
    for i in tl.static_range(CHUNKS):
        lane = tl.arange(0, LANES)[:, None] + i * LANES
        mask = (lane < INPUTS // (PARTS * WORDS)) & (word >= 0)
        for j in tl.static_range(PARTS):
            place = lane * (PARTS * WORDS) + j // 4 * 16 + word * 4 + j % 4
            tl.store(ptr + place, row[i * PARTS + j], mask=mask)


@triton.jit
def add_rows(row, residual, TILES: tl.constexpr):
    total = ()
    for j in tl.static_range(TILES):
        total = total + (add_residual(row[j], residual[j]),)
    return total


@triton.jit
def norm_row(row, weight, eps, INPUTS: tl.constexpr, TILES: tl.constexpr):
    squares = row[0].to(tl.float32) * row[0].to(tl.float32)
    for j in tl.static_range(1, TILES):
        squares += row[j].to(tl.float32) * row[j].to(tl.float32)
    scale = tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / INPUTS + eps)
    normed = ()
    for j in tl.static_range(TILES):
        normed = normed + (normalize(row[j], scale, weight[j]),)
    return normed


@triton.jit
def _largest_of_groups(largest, LANES: tl.constexpr, GROUP: tl.constexpr):
    """largest [LANES] -> the largest of each GROUP of lanes, [LANES, 1]."""
    largest = tl.max(tl.reshape(largest, [LANES // GROUP, GROUP]), axis=1)[:, None]
    return tl.reshape(tl.broadcast_to(largest, [LANES // GROUP, GROUP]), [LANES])[:, None]


@triton.jit
def round_row(
    row, scale_ptr, IS_FP8: tl.constexpr, GROUP: tl.constexpr,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`quantized_linear.round_rows`. scale_ptr: of the scale that is given, or None. GROUP: lanes that share one, 0 for
    all."""
    of_lanes = ()
    for i in tl.static_range(CHUNKS):
        largest = tl.max(tl.abs(row[i * PARTS].to(tl.float32)), axis=1)
        for j in tl.static_range(1, PARTS):
            largest = tl.maximum(largest, tl.max(tl.abs(row[i * PARTS + j].to(tl.float32)), axis=1))
        of_lanes = of_lanes + (largest,)
    if scale_ptr is not None:
        of_row = tl.load(scale_ptr)
    elif GROUP == 0:
        largest = of_lanes[0]
        for i in tl.static_range(1, CHUNKS):
            largest = tl.maximum(largest, of_lanes[i])
        of_row = scale_of_largest(tl.max(largest, axis=0), IS_FP8)
    rounded = ()
    for i in tl.static_range(CHUNKS):
        if scale_ptr is not None or GROUP == 0:
            scale = of_row
        else:
            scale = scale_of_largest(_largest_of_groups(of_lanes[i], LANES, GROUP), IS_FP8)
        for j in tl.static_range(PARTS):
            x = row[i * PARTS + j]
            codes = round_to_codes(x.to(tl.float32) / scale, IS_FP8)
            rounded = rounded + ((codes.to(tl.float32) * scale).to(x.dtype),)
    return rounded


@triton.jit
def whole_chunk(parts, PARTS: tl.constexpr):
    """A chunk as whole numbers of 16 bits, in units that each lane has.

    Returns pairs of them (PARTS / 2 tiles of int32), the sum of each lane's [LANES], and its unit [LANES].
    """
    largest = tl.abs(parts[0].to(tl.float32))
    for j in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, tl.abs(parts[j].to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
    unit = tl.maximum(tl.max(largest, axis=1), 1e-30) * (1 / 32767)
    by = (1.0 / unit)[:, None]
    unit += tl.sum(largest, axis=1) * 0.0  # an input that is no number makes none of the sums one
    pairs = ()
    for j in tl.static_range(PARTS // 2):
        # Beyond 2^23 there are no fractions: the lowest bits of a number there are the nearest whole one.
        low = (parts[2 * j].to(tl.float32) * by + 12582912.0).to(tl.int32, bitcast=True)
        high = (parts[2 * j + 1].to(tl.float32) * by + 12582912.0).to(tl.int32, bitcast=True)
        pairs = pairs + ((low & 0xFFFF) | (high << 16),)
    ones = tl.full(pairs[0].shape, 0x01010101, tl.uint32)
    total = dot_int8(ones, pairs[0], pairs[1])
    for j in tl.static_range(1, PARTS // 4):
        total += dot_int8(ones, pairs[2 * j], pairs[2 * j + 1])
    return pairs, tl.sum(total, axis=1), unit
