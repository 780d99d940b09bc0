"""Between QKV projection and attention: QK norm, rotary embedding (RoPE), keys and values into the KV cache.

Owns that sequence, which the GPU runs as one kernel. Invariant: the only writes are those to the cache, at the slots
named; a negative slot writes nothing.

    qkv row:  [ q heads | k heads | v heads ]        slot = block_id * block_size + offset in the block
"""

import torch
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.cache_codes import encode
from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.rope import apply_rope_reference


def qkv_rope_store(qkv: Tensor, heads: HeadInputs, cache: LayerCache, shape: AttentionShape) -> Tensor:
    """Stores k and v, returns q [num_tokens, num_heads, head_dim], normed and rotated.

    qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
    """
    if use_triton(qkv):
        from nanovllm.kernels.triton.attention.qkv_rope_store import qkv_rope_store_triton

        return qkv_rope_store_triton(qkv, heads, cache, shape)
    return qkv_rope_store_reference(qkv, heads, cache, shape)


def norm_and_rotate(
    q: Tensor, cos_sin: Tensor, weight: Tensor, eps: float, cache: LayerCache, slot_mapping: Tensor
) -> Tensor:
    """Queries alone, of layers that store nothing: q [num_tokens, num_heads * head_dim] -> [.., num_heads, head_dim].

    cache, slot_mapping: of the layer whose keys they meet; nothing of them is read or written.
    """
    head_dim = len(weight)
    if use_triton(q):
        from nanovllm.kernels.triton.attention.qkv_rope_store import qkv_rope_store_triton

        shape = AttentionShape(q.shape[1] // head_dim, 0, head_dim, 1.0)
        return qkv_rope_store_triton(q, HeadInputs(cos_sin, slot_mapping, weight, weight, eps), cache, shape)
    return apply_rope_reference(rms_norm_reference(q.unflatten(1, (-1, head_dim)), weight, eps), cos_sin)


def qkv_rope_store_reference(qkv: Tensor, heads: HeadInputs, cache: LayerCache, shape: AttentionShape) -> Tensor:
    cos_sin, slot_mapping, q_norm_weight, k_norm_weight, eps = heads
    num_heads, num_kv_heads = shape.num_heads, shape.num_kv_heads
    by_head = qkv.reshape(qkv.shape[0], num_heads + 2 * num_kv_heads, shape.head_dim)  # q, then k, then v
    qk, v = by_head[:, : num_heads + num_kv_heads], by_head[:, num_heads + num_kv_heads :]
    if q_norm_weight is not None and k_norm_weight is not None:
        normed_q = rms_norm_reference(qk[:, :num_heads], q_norm_weight, eps)
        normed_k = rms_norm_reference(qk[:, num_heads:], k_norm_weight, eps)
        qk = torch.cat((normed_q, normed_k), dim=1)
    if cos_sin is not None:
        qk = apply_rope_reference(qk, cos_sin)
    q, k = qk[:, :num_heads], qk[:, num_heads:]
    if slot_mapping.numel() and slot_mapping.min() < 0:
        kept = slot_mapping >= 0
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    block_ids = slot_mapping.div(cache.block_size, rounding_mode="floor")
    offsets = slot_mapping % cache.block_size
    stored, by_token = torch.stack((k, v)), cache.data.transpose(2, 3)
    if cache.scales is not None:
        stored, scales = encode(stored, cache.data.dtype)
        cache.scales.transpose(1, 2)[block_ids, offsets] = scales.permute(1, 2, 0)
    by_token[:, block_ids, offsets] = stored  # [2, num_blocks, block_size, num_kv_heads, head_dim]
    return q
