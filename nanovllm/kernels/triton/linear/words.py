"""Words of 32 bits with four or eight codes, times the inputs that meet them: what a vector kernel does all the time.

Owns the instructions for it. Whole codes are multiplied as they lie in their word, two by an instruction, and FP8 is
converted two by two. Invariant: products of whole numbers are exact, those with FP8 are float32's.
"""

import triton
import triton.language as tl

WORDS = tl.constexpr(4)  # that a lane loads at a time
_DOT_INT4 = tl.constexpr(
    "{.reg .b32 low, high, sum; and.b32 low, $1, 0x0f0f0f0f; shr.u32 high, $1, 4; and.b32 high, high, 0x0f0f0f0f;"
    "dp2a.lo.s32.u32 sum, $2, low, 0; dp2a.hi.s32.u32 sum, $3, low, sum;"
    "dp2a.lo.s32.u32 sum, $4, high, sum; dp2a.hi.s32.u32 $0, $5, high, sum;}"
)
_DOT_INT8 = tl.constexpr("{.reg .b32 sum; dp2a.lo.s32.s32 sum, $2, $1, 0; dp2a.hi.s32.s32 $0, $3, $1, sum;}")
_FP8 = tl.constexpr(
    "{.reg .b16 low, high, a, b; .reg .b32 pair; mov.b32 {low, high}, $4;"
    "cvt.rn.f16x2.e4m3x2 pair, low; mov.b32 {a, b}, pair; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;"
    "cvt.rn.f16x2.e4m3x2 pair, high; mov.b32 {a, b}, pair; cvt.f32.f16 $2, a; cvt.f32.f16 $3, b;}"
)


@triton.jit
def dot_int4(words, a, b, c, d):
    """Of each word, the lower halves of its bytes times the 16-bit numbers in a and b, the upper ones times c and d."""
    return tl.inline_asm_elementwise(
        _DOT_INT4, "=&r,r,r,r,r,r", [words, a, b, c, d], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def dot_int8(words, a, b):
    """The bytes of each word times the 16-bit numbers in a and b."""
    return tl.inline_asm_elementwise(_DOT_INT8, "=&r,r,r,r", [words, a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def fp8_numbers(words):
    """The four e4m3 of each word."""
    return tl.inline_asm_elementwise(
        _FP8, "=&f,=&f,=&f,=&f,r", [words], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1
    )


@triton.jit
def multiply_words(words, x, FIRST: tl.constexpr, KIND: tl.constexpr):
    """Sums [LANES, ROWS] of a lane's products; its inputs are tiles from FIRST on."""
    IS_FP8: tl.constexpr = KIND == "fp8"
    if IS_FP8:
        first, second, third, fourth = fp8_numbers(words)
        products = first * x[FIRST][:, None, :]
        products += second * x[FIRST + 1][:, None, :]
        products += third * x[FIRST + 2][:, None, :]
        products += fourth * x[FIRST + 3][:, None, :]
    elif KIND == "int4":
        products = dot_int4(
            words, x[FIRST][:, None, :], x[FIRST + 1][:, None, :], x[FIRST + 2][:, None, :], x[FIRST + 3][:, None, :]
        )
    else:
        products = dot_int8(words, x[FIRST][:, None, :], x[FIRST + 1][:, None, :])
    return tl.sum(products, axis=2)
