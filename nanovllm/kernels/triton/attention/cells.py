"""Cells of the paged KV cache in Triton: rows of numbers, or codes of 8 bits with scales beside them.

Owns how codes are made, loaded and taken for numbers; `kernels/cache_codes.py` says what they mean. Invariant: codes
and scales are the reference's to the bit, on any GPU: they are made by arithmetic on bits.

Codes become 16-bit numbers without their scale, exactly, and the tensor cores multiply those. The scale of a key is
multiplied into its score, that of a value into its weight in the softmax. float16 takes e4m3 in one instruction for two
codes, where bfloat16 takes a chain of them. GPUs that do not know e4m3 get it as bytes, whose bits are moved in place.

What bounds decode over codes is shared memory: tensor cores want values turned, keys along each register, and the
instruction that turns a tile on its way to them takes 16 bits at a time. So tiles are loaded as words of two codes,
columns 2 i and 2 i + 1 of a row, and become numbers behind it, in registers: one for each of two tiles, of even and of
odd columns. Queries come in such halves, and outputs leave in them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import LayerCache
from nanovllm.kernels.cache_codes import INFINITY_BITS, KEPT_BITS, LARGEST, LEAST_BITS
from nanovllm.kernels.triton.common.device_limits import has_fp8

_E4M3, _INT8 = torch.float8_e4m3fn, torch.int8
LARGEST_E4M3, LARGEST_INT8 = tl.constexpr(LARGEST[_E4M3]), tl.constexpr(LARGEST[_INT8])
KEPT, LEAST, INFINITE = tl.constexpr(KEPT_BITS), tl.constexpr(LEAST_BITS), tl.constexpr(INFINITY_BITS)


def _instructions(a: int, b: int, c: int, d: int) -> tuple[tl.constexpr, tl.constexpr, tl.constexpr]:
    """From e4m3, int8 and bytes of e4m3: the four codes of register $2 become float16, codes a, b in $0 and c, d in $1.

    int8: 0x6400 is 1024, with the integers below it. Bytes of e4m3: sign, exponent and mantissa move to where float16
    has them, and the exponents differ by 8.
    """
    e4m3 = (
        f"{{.reg .b32 t; .reg .b16 a, b; prmt.b32 t, $2, 0, 0x{d}{c}{b}{a}; mov.b32 {{a, b}}, t;"
        "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b;}"
    )
    int8 = (
        f"{{.reg .b32 t, c; xor.b32 t, $2, 0x80808080; mov.b32 c, 0x64806480; prmt.b32 $0, t, 0x64646464, 0x4{b}4{a};"
        f"prmt.b32 $1, t, 0x64646464, 0x4{d}4{c}; sub.f16x2 $0, $0, c; sub.f16x2 $1, $1, c;}}"
    )
    e4m3_bytes = (
        f"{{.reg .b32 a, b, s, t, c; mov.b32 c, 0x5c005c00; prmt.b32 a, $2, 0, 0x{b}4{a}4;"
        f"prmt.b32 b, $2, 0, 0x{d}4{c}4;"
        "shr.b32 s, a, 1; shr.b32 t, b, 1; and.b32 s, s, 0x3f803f80; and.b32 t, t, 0x3f803f80;"
        "and.b32 a, a, 0x80008000; and.b32 b, b, 0x80008000; or.b32 a, a, s; or.b32 b, b, t;"
        "mul.f16x2 $0, a, c; mul.f16x2 $1, b, c;}"
    )
    return tl.constexpr(e4m3), tl.constexpr(int8), tl.constexpr(e4m3_bytes)


FROM_E4M3, FROM_INT8, FROM_E4M3_BYTES = _instructions(0, 1, 2, 3)
E4M3_IN_HALVES, INT8_IN_HALVES, E4M3_BYTES_IN_HALVES = _instructions(0, 2, 1, 3)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it becomes whole


def data_of(cache: LayerCache) -> Tensor:
    """The cache's data as kernels take them: e4m3 as bytes where Triton does not know it."""
    return cache.data.view(torch.uint8) if cache.data.dtype == _E4M3 and not has_fp8(cache.data.device) else cache.data


def pairs_of(cache: LayerCache) -> Tensor | None:
    """The scales of each cell's key and value [num_blocks, num_kv_heads, block_size], in the halves of an int32."""
    return None if cache.scales is None else cache.scales.view(torch.int32).squeeze(3)


@triton.jit
def load_pairs(
    pairs_ptr, blocks, t, seq_len, head,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Of tile t: the scales of its cells [TILE]. blocks: `blocks_of_tile`'s."""
    in_tile = tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        cell = (blocks * NUM_KV_HEADS + head) * BLOCK_SIZE + t * TILE % BLOCK_SIZE + in_tile
    else:
        cell = (blocks * NUM_KV_HEADS + head) * BLOCK_SIZE + (t * TILE + in_tile) % BLOCK_SIZE
    if RAGGED:
        return tl.load(pairs_ptr + cell, mask=in_tile < seq_len - t * TILE, other=0)
    else:
        return tl.load(pairs_ptr + cell)


@triton.jit
def key_scales(pairs):
    return (pairs << 16).to(tl.float32, bitcast=True)


@triton.jit
def value_scales(pairs):
    """Of values, float32, as 2^exponent * rest: the exponent, 2^-exponent, and the rest, from 1 to 2.

    Without a logarithm or a division. Cells that hold nothing yet have a scale of 0, which is taken for the least one.
    """
    bits = tl.maximum(pairs & -65536, tl.full(pairs.shape, LEAST, tl.int32))
    exponent = ((bits >> 23) | 0x4B000000).to(tl.float32, bitcast=True) - 8388735.0  # 2^23 + n has n below; 127 is 2^0
    inverse = (0x7F000000 - (bits & 0x7F800000)).to(tl.float32, bitcast=True)
    return exponent, inverse, ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def numbers_of(codes, q):
    """Codes, without their scales, as what queries q are multiplied with; what are numbers stay as they are."""
    IS_FP8: tl.constexpr = codes.dtype == tl.float8e4nv
    if IS_FP8:
        codes = _four_by_four(codes.to(tl.uint8, bitcast=True), q, FROM_E4M3)
    elif codes.dtype == tl.uint8:
        codes = _four_by_four(codes, q, FROM_E4M3_BYTES)
    elif codes.dtype == tl.int8:
        codes = _four_by_four(codes.to(tl.uint8, bitcast=True), q, FROM_INT8)
    return codes


@triton.jit
def _four_by_four(codes, q, ASM: tl.constexpr):
    # Said to have effects, so that it stays where a tile is loaded in rows of 16 bytes. The compiler would move it
    # behind the change to the layout of the tensor cores, and take a tile of values byte by byte.
    numbers = tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=False, pack=4)
    return numbers.to(tl.float32 if q.dtype == tl.float32 else tl.float16)


@triton.jit
def halves_of(words, q, dtype: tl.constexpr):
    """`numbers_of` words of two codes in this dtype: the lower ones, the upper ones."""
    IS_FP8: tl.constexpr = dtype == tl.float8e4nv
    if IS_FP8:
        lower, upper = _two_by_two(words, E4M3_IN_HALVES)
    elif dtype == tl.uint8:
        lower, upper = _two_by_two(words, E4M3_BYTES_IN_HALVES)
    else:
        lower, upper = _two_by_two(words, INT8_IN_HALVES)
    NUMBERS: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.float16
    return lower.to(NUMBERS), upper.to(NUMBERS)


@triton.jit
def _two_by_two(words, ASM: tl.constexpr):
    # Said to have no effects, so that the compiler moves it behind the change to the layout of the tensor cores.
    return tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)


@triton.jit
def in_halves(x, pairs_ptr):
    """Of a cache in codes: columns 2 i and columns 2 i + 1 of x."""
    if pairs_ptr is not None:
        x = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return x


@triton.jit
def from_halves(x, pairs_ptr):
    if pairs_ptr is not None:
        even, odd = x
        x = tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])
    return x


@triton.jit
def size_bits(x):
    """|x| of float32 as integers, which are in the same order, with NaN beyond infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_bits(largest, dtype: tl.constexpr):
    """Bits of the float32 scale of rows whose largest number has these `size_bits`; a bfloat16 is their upper half."""
    LARGEST: tl.constexpr = LARGEST_INT8 if dtype == tl.int8 else LARGEST_E4M3
    bits = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full(largest.shape, LARGEST, tl.float32))
    bits = tl.minimum(bits.to(tl.int32, bitcast=True), tl.full(largest.shape, INFINITE, tl.int32))
    return tl.maximum((bits + 0xFFFF) & KEPT, tl.full(largest.shape, LEAST, tl.int32))


@triton.jit
def codes_of(x, scale, dtype: tl.constexpr):
    """float32 rows as codes in the cache's dtype. scale: float32, of x's shape."""
    LARGEST: tl.constexpr = LARGEST_INT8 if dtype == tl.int8 else LARGEST_E4M3
    x = tl.maximum(tl.minimum(tl.div_rn(x, scale), LARGEST), -LARGEST)
    if dtype == tl.int8:
        return ((x + ROUNDING) - ROUNDING).to(tl.int8)
    else:
        bits, size = x.to(tl.int32, bitcast=True), size_bits(x)
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # 2^14 + n 2^-9 has the integer n below
        code = tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 128)  # 2^-6 is the least normal number
        return code.to(tl.uint8).to(dtype, bitcast=True)
