"""Attention with a soft-cap on its scores (Gemma 2), or with sinks (gpt-oss), by PyTorch's operations.

Owns what `scaled_dot_product_attention` has no argument for. Invariant: what `attention_with` returns is called as that
function is.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def attention_with(softcap: float | None, sinks: Tensor | None) -> Callable[..., Tensor]:
    """sinks: see `kernels.paged_attention`."""
    return partial(_attention, softcap=softcap, sinks=sinks)


def softmax_with(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """scores [.., num_keys] -> weights of the same shape and dtype. sinks: of the same dimensions, the last one 1."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    enable_gqa: bool = False,
) -> Tensor:
    """query [n, num_heads, query_len, head_dim]; key, value [n, num_kv_heads, seq_len, head_dim].

    Where heads share keys, they may stand in for queries: query [n, num_kv_heads, group, head_dim].
    """
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril_()
    if enable_gqa:
        query = query.unflatten(1, (key.shape[1], -1))  # [n, num_kv_heads, group, query_len, head_dim]
        key, value = key.unsqueeze(2), value.unsqueeze(2)
    scores = query @ key.transpose(-1, -2)
    scores = scores.mul_(scale) if softcap is None else scores.mul_(scale / softcap).tanh_().mul_(softcap)
    if attn_mask is not None:
        scores.masked_fill_(~attn_mask, float("-inf"))
    if sinks is not None:
        sinks = sinks.view(key.shape[1], *[-1 if dim == 2 else 1 for dim in range(2, scores.dim())])
    out = softmax_with(scores, sinks) @ value
    return out.flatten(1, 2) if enable_gqa else out
