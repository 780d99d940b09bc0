"""Parts of the skinny GEMM and GEMV kernels: loads by chunks of inputs, norm as prologue, bias and gate as epilogue.

Owns where values are rounded, which is where the plain operations in sequence round.
"""

import triton
import triton.language as tl


@triton.jit
def load_chunk(ptr, offset, col, i: tl.constexpr, INPUTS: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk i of the rows at `offset`; `col` counts from 0 to CHUNK. Behind the last input there are zeros."""
    if (i + 1) * CHUNK <= INPUTS:
        return tl.load(ptr + offset + i * CHUNK + col)
    else:
        return tl.load(ptr + offset + i * CHUNK + col, mask=col < INPUTS - i * CHUNK, other=0.0)


@triton.jit
def add_residual(x, residual):
    return (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)


@triton.jit
def normalize(x, scale, norm_weight):
    normed = (x.to(tl.float32) * scale).to(x.dtype)
    return (normed.to(tl.float32) * norm_weight.to(tl.float32)).to(x.dtype)


@triton.jit
def scale_of_largest(largest, IS_FP8: tl.constexpr):
    """The scale of numbers of which the largest is that large."""
    return tl.maximum(largest, 1e-12) / (448.0 if IS_FP8 else 127.0)


@triton.jit
def round_to_codes(x, IS_FP8: tl.constexpr):
    """Numbers over their scale -> the nearest codes, whole ones as float32."""
    LARGEST: tl.constexpr = 448.0 if IS_FP8 else 127.0
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    if IS_FP8:
        return x.to(tl.float8e4nv)
    else:
        return (x + 12582912.0) - 12582912.0  # there are no fractions beyond 2^23


@triton.jit
def finish(
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
