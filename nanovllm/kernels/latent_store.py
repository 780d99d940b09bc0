"""Before attention over latents (MLA; DeepSeek-AI, 2024): the latent's norm, rotation, and the row of the KV cache.

Owns that sequence, which the GPU runs as one kernel, and what is read of such rows by themselves. Invariant: it writes
to the cache, at the slots named (a negative slot writes nothing), and to `turned`, and nowhere else.

    kv row      [ latent | key part that carries the position ]
    cache row   [ norm of latent | the same, rotated ]              of one "KV head", whose values are the latents
    query       [ what scores latents | turned ]                    of each head; the first part is `absorbed.py`'s
"""

import torch
from torch import Tensor

from nanovllm.kernels.attention_types import HeadInputs, LayerCache
from nanovllm.kernels.cache_codes import decode_latents, encode_latents
from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.rope import apply_rope_reference


def latent_store(
    turned: Tensor, q_rope: Tensor, kv: Tensor, heads: HeadInputs, cache: LayerCache, is_neox_style: bool
) -> None:
    """Writes turned, from q_rope, both [num_tokens, num_heads, rope_dim], and the rows of the cache.

    kv [num_tokens, rank + rope_dim]; rank is the size of heads.k_norm_weight. is_neox_style: dimensions i and
    i + rope_dim / 2 turn together; else 2i and 2i + 1, which come out as i and i + rope_dim / 2, of queries and keys
    alike. Last dimensions are contiguous.
    """
    if use_triton(turned):
        from nanovllm.kernels.triton.attention.latent_store import latent_store_triton

        latent_store_triton(turned, q_rope, kv, heads, cache, is_neox_style)
    else:
        latent_store_reference(turned, q_rope, kv, heads, cache, is_neox_style)


def latent_store_reference(
    turned: Tensor, q_rope: Tensor, kv: Tensor, heads: HeadInputs, cache: LayerCache, is_neox_style: bool
) -> None:
    cos_sin, slot_mapping, _, norm_weight, eps = heads
    assert norm_weight is not None
    rank = norm_weight.shape[0]
    parts = torch.cat((q_rope, kv[:, None, rank:]), dim=1)
    if not is_neox_style:
        parts = parts.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    if cos_sin is not None:
        parts = apply_rope_reference(parts, cos_sin)
    turned.copy_(parts[:, :-1])
    rows = torch.cat((rms_norm_reference(kv[:, :rank], norm_weight, eps), parts[:, -1]), dim=-1)
    if slot_mapping.numel() and slot_mapping.min() < 0:
        kept = slot_mapping >= 0
        rows, slot_mapping = rows[kept], slot_mapping[kept]
    block_ids, offsets = slot_mapping.div(cache.block_size, rounding_mode="floor"), slot_mapping % cache.block_size
    if cache.scales is not None:
        rows, scales = encode_latents(rows, rank, cache.data.dtype)
        cache.scales[block_ids, 0, offsets] = scales
    cache.data[0, block_ids, 0, offsets] = rows


def stored_rows(cache: LayerCache, slots: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """Rows of the cache as numbers, [num_tokens, rank + rope_dim]. slots: none is negative."""
    if cache.scales is None:
        return cache.data.flatten(0, 3).index_select(0, slots)
    codes = cache.data.view(torch.int8).flatten(0, 3).index_select(0, slots).view(cache.data.dtype)
    return decode_latents(codes, cache.scales.flatten(0, 2).index_select(0, slots), rank).to(dtype)
