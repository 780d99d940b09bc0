"""What kernels do to codes in assembly, for the interpreter, which knows none."""

from typing import Any


def plain_split_int4(codes: Any, dtype: Any) -> tuple[Any, Any]:
    """`quantized_gemm.split_int4`; of float16, as the interpreter's bfloat16 is not asked for."""
    import triton.language as tl

    return tuple((bits.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) for bits in (codes & 15, codes >> 4))


def plain_split_words(words: Any) -> tuple[Any, ...]:
    """`quantized_gemv.split_words`."""
    import triton.language as tl

    halves = [(words >> shift) & 15 for shift in range(0, 32, 4)]
    return tuple(half.to(tl.float32) + (2048.0, 128.0)[i % 2] for i, half in enumerate(halves))
