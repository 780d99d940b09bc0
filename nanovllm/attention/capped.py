"""Attention with a soft-cap on its scores (Gemma 2), by PyTorch's operations.

Owns what `scaled_dot_product_attention` does, with softcap * tanh(score / softcap) for each score. Invariant: it is
called as that function is.
"""

import torch
from torch import Tensor


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float,
    softcap: float,
    enable_gqa: bool = False,
) -> Tensor:
    """query [n, num_heads, query_len, head_dim]; key, value [n, num_kv_heads, seq_len, head_dim]."""
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril_()
    if enable_gqa:
        query = query.unflatten(1, (key.shape[1], -1))  # [n, num_kv_heads, group, query_len, head_dim]
        key, value = key.unsqueeze(2), value.unsqueeze(2)
    scores = (query @ key.transpose(-1, -2)).mul_(scale / softcap).tanh_().mul_(softcap)
    if attn_mask is not None:
        scores.masked_fill_(~attn_mask, float("-inf"))
    out = scores.softmax(-1) @ value
    return out.flatten(1, 2) if enable_gqa else out
