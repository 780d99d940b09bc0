"""Norm, rotation and the cache row of latent attention in Triton, in one kernel.

Owns how that sequence runs on a GPU: a program takes one token, its latent and the rotated parts of all heads.
Invariant: rounds exactly where the reference rounds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import HeadInputs, LayerCache
from nanovllm.kernels.triton.attention.cells import codes_of, data_of, scale_bits, size_bits
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import next_power_of_2


@triton.jit
def store_latent(
    token, weight, turned_ptr, q_ptr, kv_ptr, cos_sin_ptr, slot_ptr, cache_ptr, scales_ptr,
    turned_stride_token, turned_stride_head, q_stride_token, q_stride_head, kv_stride, cos_sin_stride,
    STRIDE_BLOCK: tl.constexpr, STRIDE_TOKEN: tl.constexpr, eps,
    HAS_ROPE: tl.constexpr, IS_NEOX: tl.constexpr, NUM_HEADS: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One token's row of the cache, and the rotated parts of its queries. weight: of the norm [BLOCK_RANK]."""
    rank = tl.arange(0, BLOCK_RANK)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    row_ptr = cache_ptr + (slot // BLOCK_SIZE) * STRIDE_BLOCK + (slot % BLOCK_SIZE) * STRIDE_TOKEN
    latent = tl.load(kv_ptr + token * kv_stride + rank, mask=rank < RANK, other=0.0)
    dtype = latent.dtype
    value = latent.to(tl.float32)
    normed = (value * tl.rsqrt(tl.sum(value * value, axis=0) / RANK + eps)).to(dtype)
    normed = (normed.to(tl.float32) * weight.to(tl.float32)).to(dtype)
    cell_dtype: tl.constexpr = cache_ptr.dtype.element_ty
    if scales_ptr is None:
        stored = normed.to(cell_dtype)
    else:
        number = normed.to(tl.float32)
        bits = scale_bits(tl.max(size_bits(number), axis=0), cell_dtype)
        stored = codes_of(number, tl.zeros([BLOCK_RANK], tl.float32) + bits.to(tl.float32, bitcast=True), cell_dtype)
        tl.store(scales_ptr + 2 * slot + 1, (bits >> 16).to(tl.int16), mask=slot >= 0)
    tl.store(row_ptr + rank, stored, mask=(rank < RANK) & (slot >= 0))

    # The heads' rotated parts, and behind them the key's.
    head, col = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    is_query = (head < NUM_HEADS) & (col < HALF)
    is_key = (head == NUM_HEADS) & (col < HALF)
    q_ptr += token * q_stride_token + head * q_stride_head
    key_ptr = kv_ptr + token * kv_stride + RANK + head * 0
    if IS_NEOX:
        first, second = col, HALF + col
    else:
        first, second = 2 * col, 2 * col + 1
    a = tl.load(q_ptr + first, mask=is_query, other=0.0).to(tl.float32)
    a += tl.load(key_ptr + first, mask=is_key, other=0.0).to(tl.float32)
    b = tl.load(q_ptr + second, mask=is_query, other=0.0).to(tl.float32)
    b += tl.load(key_ptr + second, mask=is_key, other=0.0).to(tl.float32)
    if HAS_ROPE:
        cos = tl.load(cos_sin_ptr + token * cos_sin_stride + col, mask=col < HALF, other=0.0)
        sin = tl.load(cos_sin_ptr + token * cos_sin_stride + HALF + col, mask=col < HALF, other=0.0)
        a, b = a * cos - b * sin, b * cos + a * sin
    a, b = a.to(dtype), b.to(dtype)
    out_ptr = turned_ptr + token * turned_stride_token + head * turned_stride_head + col
    tl.store(out_ptr, a, mask=is_query)
    tl.store(out_ptr + HALF, b, mask=is_query)
    if scales_ptr is None:
        a, b = a.to(cell_dtype), b.to(cell_dtype)
    else:
        a, b = a.to(tl.float32), b.to(tl.float32)
        largest = tl.where(is_key, tl.maximum(size_bits(a), size_bits(b)), 0)
        bits = scale_bits(tl.max(tl.max(largest, axis=1), axis=0), cell_dtype)
        scale = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32) + bits.to(tl.float32, bitcast=True)
        a, b = codes_of(a, scale, cell_dtype), codes_of(b, scale, cell_dtype)
        tl.store(scales_ptr + 2 * slot, (bits >> 16).to(tl.int16), mask=slot >= 0)
    is_stored = is_key & (slot >= 0)
    key_out_ptr = row_ptr + RANK + col + head * 0
    tl.store(key_out_ptr, a, mask=is_stored)
    tl.store(key_out_ptr + HALF, b, mask=is_stored)


@triton.jit
def _latent_store_kernel(
    turned_ptr,
    q_ptr,
    kv_ptr,
    cos_sin_ptr,
    weight_ptr,
    slot_ptr,
    cache_ptr,
    scales_ptr,
    turned_stride_token,
    turned_stride_head,
    q_stride_token,
    q_stride_head,
    kv_stride,
    cos_sin_stride,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    eps,
    HAS_ROPE: tl.constexpr,
    IS_NEOX: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, BLOCK_RANK)
    weight = tl.load(weight_ptr + rank, mask=rank < RANK, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now: what starts next may read what was written before the kernel ahead of this one ended.
        tl.extra.cuda.gdc_launch_dependents()
    store_latent(
        token, weight, turned_ptr, q_ptr, kv_ptr, cos_sin_ptr, slot_ptr, cache_ptr, scales_ptr,
        turned_stride_token, turned_stride_head, q_stride_token, q_stride_head, kv_stride, cos_sin_stride,
        STRIDE_BLOCK, STRIDE_TOKEN, eps,
        HAS_ROPE, IS_NEOX, NUM_HEADS, RANK, HALF, BLOCK_SIZE, BLOCK_HEADS, BLOCK_RANK, BLOCK_HALF,
    )  # fmt: skip


def latent_store_triton(
    turned: Tensor, q_rope: Tensor, kv: Tensor, heads: HeadInputs, cache: LayerCache, is_neox_style: bool
) -> None:
    """See `latent_store.latent_store`."""
    cos_sin, slot_mapping, _, norm_weight, eps = heads
    assert norm_weight is not None
    num_tokens = q_rope.shape[0]
    if not num_tokens:
        return
    launch(
        _latent_store_kernel, (num_tokens,), kv.device,
        turned, q_rope, kv, cos_sin, norm_weight, slot_mapping, data_of(cache), scales_of(cache),
        turned.stride(0), turned.stride(1), q_rope.stride(0), q_rope.stride(1), kv.stride(0),
        0 if cos_sin is None else cos_sin.stride(0), cache.data.stride(1), cache.data.stride(3), eps,
        **store_arguments(q_rope, heads, cache, is_neox_style), num_warps=4,
    )  # fmt: skip


def scales_of(cache: LayerCache) -> Tensor | None:
    """As `store_latent` takes them: their bits."""
    return None if cache.scales is None else cache.scales.view(torch.int16)


def store_arguments(q_rope: Tensor, heads: HeadInputs, cache: LayerCache, is_neox_style: bool) -> dict[str, Any]:
    """The constants of `store_latent` that follow from sizes."""
    assert heads.k_norm_weight is not None
    (_, num_heads, rope_dim), rank = q_rope.shape, heads.k_norm_weight.shape[0]
    return {
        "HAS_ROPE": heads.cos_sin is not None,
        "IS_NEOX": is_neox_style,
        "NUM_HEADS": num_heads,
        "RANK": rank,
        "HALF": rope_dim // 2,
        "BLOCK_SIZE": cache.block_size,
        "BLOCK_HEADS": next_power_of_2(num_heads + 1),
        "BLOCK_RANK": next_power_of_2(rank),
        "BLOCK_HALF": next_power_of_2(rope_dim // 2),
    }
