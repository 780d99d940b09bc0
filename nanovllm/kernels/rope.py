"""Rotary position embedding (Su et al., 2021) in its half-split ("neox") form.

Owns the rotation; the angles and their scalings belong to the layer that builds `cos_sin`. Invariant: pure; products in
float32, one rounding at the end.

    x = [ a | b ],  cos_sin = [ cos | sin ]   ->   [ a cos - b sin | b cos + a sin ]
"""

import torch
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [num_tokens, heads, head_dim], any strides; cos_sin [num_tokens, head_dim] float32 -> new, of x's dtype."""
    if use_triton(x):
        from nanovllm.kernels.rope_triton import apply_rope_triton

        return apply_rope_triton(x, cos_sin)
    return apply_rope_reference(x, cos_sin)


def apply_rope_reference(x: Tensor, cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)  # each [num_tokens, 1, head_dim / 2]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat(((a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin)), dim=-1).to(x.dtype)
