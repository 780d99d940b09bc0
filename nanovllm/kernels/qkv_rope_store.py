"""What happens between the QKV projection and attention: norm of q and k, rotation, keys and values into the cache.

Owns that sequence, which the GPU runs as one kernel. Invariant: the only writes are those to `kv_cache`, at the slots
named; a negative slot writes nothing.

    qkv row:  [ q heads | k heads | v heads ]        slot = block_id * block_size + offset in the block
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.rope import apply_rope_reference


class HeadInputs(NamedTuple):
    """What that sequence needs beside the projection's output and the cache, for kernels that do more than it: see
    `qkv_rope_store`."""

    cos_sin: Tensor | None
    slot_mapping: Tensor
    q_norm_weight: Tensor | None
    k_norm_weight: Tensor | None
    eps: float


def qkv_rope_store(
    qkv: Tensor,
    cos_sin: Tensor | None,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """Stores k and v, returns q [num_tokens, num_heads, head_dim], normed and rotated.

    qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; cos_sin [num_tokens, head_dim] float32, None for a
    model without rotation; kv_cache [2, num_blocks, num_kv_heads, block_size, head_dim] with any strides;
    slot_mapping [num_tokens] integers; norm weights [head_dim], both None where the model has no such norm.
    """
    if use_triton(qkv):
        from nanovllm.kernels.qkv_rope_store_triton import qkv_rope_store_triton

        fused = qkv_rope_store_triton
    else:
        fused = qkv_rope_store_reference
    return fused(
        qkv, cos_sin, kv_cache, slot_mapping, num_heads, num_kv_heads, head_dim, q_norm_weight, k_norm_weight, eps
    )


def qkv_rope_store_reference(
    qkv: Tensor,
    cos_sin: Tensor | None,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
) -> Tensor:
    heads = qkv.reshape(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)  # q, then k, then v
    qk, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
    if q_norm_weight is not None and k_norm_weight is not None:
        normed_q = rms_norm_reference(qk[:, :num_heads], q_norm_weight, eps)
        normed_k = rms_norm_reference(qk[:, num_heads:], k_norm_weight, eps)
        qk = torch.cat((normed_q, normed_k), dim=1)
    if cos_sin is not None:
        qk = apply_rope_reference(qk, cos_sin)
    q, k = qk[:, :num_heads], qk[:, num_heads:]
    if slot_mapping.numel() and slot_mapping.min() < 0:
        stored = slot_mapping >= 0
        k, v, slot_mapping = k[stored], v[stored], slot_mapping[stored]
    block_ids = slot_mapping.div(kv_cache.shape[3], rounding_mode="floor")
    offsets = slot_mapping % kv_cache.shape[3]
    by_token = kv_cache.transpose(2, 3)  # [2, num_blocks, block_size, num_kv_heads, head_dim]
    by_token[:, block_ids, offsets] = torch.stack((k, v))
    return q
