"""Triton twin of `rope.py`, for models that rotate outside `qkv_rope_store`.

Owns how the rotation runs on a GPU. Invariant: float32 products, one rounding at the end, as the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rope_kernel(
    x_ptr,
    cos_sin_ptr,
    out_ptr,
    x_stride_token,
    x_stride_head,
    cos_sin_stride,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    col = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < NUM_HEADS) & (col < HALF)
    x_ptr += token * x_stride_token + head * x_stride_head + col
    first = tl.load(x_ptr, mask=mask, other=0.0)
    second = tl.load(x_ptr + HALF, mask=mask, other=0.0)
    cos = tl.load(cos_sin_ptr + token * cos_sin_stride + col, mask=col < HALF, other=0.0)
    sin = tl.load(cos_sin_ptr + token * cos_sin_stride + HALF + col, mask=col < HALF, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    out_ptr += (token * NUM_HEADS + head) * (2 * HALF) + col
    tl.store(out_ptr, (a * cos - b * sin).to(first.dtype), mask=mask)
    tl.store(out_ptr + HALF, (b * cos + a * sin).to(first.dtype), mask=mask)


def apply_rope_triton(x: Tensor, cos_sin: Tensor) -> Tensor:
    """See `rope.apply_rope`; the last dimension of both is contiguous."""
    num_tokens, num_heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        _rope_kernel[(num_tokens,)](
            x, cos_sin, out, x.stride(0), x.stride(1), cos_sin.stride(0),
            NUM_HEADS=num_heads, HALF=head_dim // 2, BLOCK_HEADS=triton.next_power_of_2(num_heads),
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2), num_warps=4,
        )  # fmt: skip
    return out
