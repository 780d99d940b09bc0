"""Rotary position embedding (Su et al., 2021) in its half-split ("neox") form.

Owns the rotation; the angles and their scalings belong to the layer that builds `cos_sin`. On a GPU it is part of
`qkv_rope_store`. Invariant: pure; products in float32, one rounding at the end.

    x = [ a | b ],  cos_sin = [ cos | sin ]   ->   [ a cos - b sin | b cos + a sin ]
"""

import torch
from torch import Tensor


def apply_rope_reference(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [num_tokens, heads, head_dim], any strides; cos_sin [num_tokens, head_dim] float32 -> new, of x's dtype."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)  # each [num_tokens, 1, head_dim / 2]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat(((a * cos).addcmul_(b, sin, value=-1), (b * cos).addcmul_(a, sin)), dim=-1).to(x.dtype)
