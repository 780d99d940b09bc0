"""Rotary position embedding (Su et al., 2021) in its half-split ("neox") form.

Owns the rotation; the angles and their scalings belong to the layer that builds `cos_sin`. Invariant: pure; products in
float32, one rounding at the end.

    x = [ a | b ],  cos_sin = [ cos | sin ]   ->   [ a cos - b sin | b cos + a sin ]
"""

from torch import Tensor

from nanovllm.kernels.dispatch import use_triton


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [num_tokens, heads, head_dim] with any strides, cos_sin [num_tokens, head_dim] float32 -> new, x's shape and dtype."""
    if use_triton(x):
        from nanovllm.kernels.rope_triton import apply_rope_triton

        return apply_rope_triton(x, cos_sin)
    return apply_rope_reference(x, cos_sin)


def apply_rope_reference(x: Tensor, cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)  # each [num_tokens, 1, head_dim / 2]
    halves = x.unflatten(-1, (2, -1))
    rotated = halves * cos.unsqueeze(2)  # [num_tokens, heads, 2, head_dim / 2], float32
    rotated[:, :, 0].addcmul_(halves[:, :, 1], sin, value=-1)
    rotated[:, :, 1].addcmul_(halves[:, :, 0], sin)
    return rotated.flatten(-2).to(x.dtype)
