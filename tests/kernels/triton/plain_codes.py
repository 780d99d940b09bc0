"""What kernels do to codes in assembly, for the interpreter, which knows none."""

from typing import Any


def plain_split_int4(codes: Any, dtype: Any) -> tuple[Any, Any]:
    """`quantized_gemm.split_int4`; of float16, as the interpreter's bfloat16 is not asked for."""
    import triton.language as tl

    return tuple((bits.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) for bits in (codes & 15, codes >> 4))


def plain_fp8_numbers(words: Any) -> tuple[Any, ...]:
    """`words.fp8_numbers`."""
    import triton.language as tl

    codes = [((words >> shift) & 255).to(tl.uint8) for shift in range(0, 32, 8)]
    return tuple(code.to(tl.float8e4nv, bitcast=True).to(tl.float32) for code in codes)


def plain_dot_int4(words: Any, *pairs: Any) -> Any:
    """`words.dot_int4`."""
    return sum(_times_pairs(words >> 4 * half, 15, *pairs[2 * half : 2 * half + 2]) for half in range(2))


def plain_dot_int8(words: Any, *pairs: Any) -> Any:
    """`words.dot_int8`: of bytes with a sign."""
    return _times_pairs(words, 255, *pairs)


def _times_pairs(words: Any, mask: int, *pairs: Any) -> Any:
    import triton.language as tl

    total = 0
    for i, pair in enumerate(pairs):
        for j, number in enumerate((pair << 16 >> 16, pair >> 16)):
            code = ((words >> (16 * i + 8 * j)) & mask).to(tl.int32)
            total = number * (((code ^ 128) - 128) if mask == 255 else code) + total
    return total
