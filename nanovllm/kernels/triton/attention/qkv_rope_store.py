"""QK norm, RoPE and the KV-cache store in Triton, in one kernel.

Owns how that sequence runs on a GPU: a program takes one token and a handful of heads, of any of the three kinds. Each
head is held as its two halves, so the rotation is elementwise. Invariant: rounds exactly where the reference rounds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.triton.attention.cells import codes_of, data_of, scale_bits, size_bits
from nanovllm.kernels.triton.common.launch import launch
from nanovllm.kernels.triton.common.sizes import cdiv, next_power_of_2

# Heads per program times half a head: elements of each half that a program holds.
ELEMENTS = 1024


@triton.jit
def _qkv_rope_store_kernel(
    qkv_ptr,
    cos_sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    slot_ptr,
    q_out_ptr,
    cache_ptr,
    scales_ptr,
    qkv_stride,
    cos_sin_stride,
    cache_stride_kv,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    eps,
    ROPE: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    col = tl.arange(0, BLOCK_HALF)[None, :]
    col_mask = col < HALF
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & col_mask
    if Q_NORM:
        q_weight_a = tl.load(q_weight_ptr + col, mask=col_mask, other=0.0)
        q_weight_b = tl.load(q_weight_ptr + HALF + col, mask=col_mask, other=0.0)
    if K_NORM:
        k_weight_a = tl.load(k_weight_ptr + col, mask=col_mask, other=0.0)
        k_weight_b = tl.load(k_weight_ptr + HALF + col, mask=col_mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now: what starts next may read what was written before the kernel ahead of this one ended.
        tl.extra.cuda.gdc_launch_dependents()
    slot = tl.load(slot_ptr + token).to(tl.int64)
    row_ptr = qkv_ptr + token * qkv_stride + head * (2 * HALF) + col
    first = tl.load(row_ptr, mask=mask, other=0.0)
    second = tl.load(row_ptr + HALF, mask=mask, other=0.0)
    dtype = first.dtype
    a, b = first.to(tl.float32), second.to(tl.float32)

    if Q_NORM or K_NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        normed_a = (a * scale).to(dtype).to(tl.float32)
        normed_b = (b * scale).to(dtype).to(tl.float32)
        if Q_NORM:
            a = tl.where(is_q, (normed_a * q_weight_a.to(tl.float32)).to(dtype).to(tl.float32), a)
            b = tl.where(is_q, (normed_b * q_weight_b.to(tl.float32)).to(dtype).to(tl.float32), b)
        if K_NORM:
            a = tl.where(is_k, (normed_a * k_weight_a.to(tl.float32)).to(dtype).to(tl.float32), a)
            b = tl.where(is_k, (normed_b * k_weight_b.to(tl.float32)).to(dtype).to(tl.float32), b)

    if ROPE:
        cos = tl.load(cos_sin_ptr + token * cos_sin_stride + col, mask=col_mask, other=0.0)
        sin = tl.load(cos_sin_ptr + token * cos_sin_stride + HALF + col, mask=col_mask, other=0.0)
        rotated = is_q | is_k
        turned = tl.where(rotated, a * cos - b * sin, a)
        b = tl.where(rotated, b * cos + a * sin, b)
        a = turned

    first, second = a.to(dtype), b.to(dtype)
    q_ptr = q_out_ptr + (token * NUM_HEADS + head) * (2 * HALF) + col
    tl.store(q_ptr, first, mask=is_q & col_mask)
    tl.store(q_ptr + HALF, second, mask=is_q & col_mask)
    kv_head = head - NUM_HEADS  # keys 0 .. NUM_KV_HEADS, then values
    is_v = kv_head >= NUM_KV_HEADS
    kv_head = tl.where(is_v, kv_head - NUM_KV_HEADS, kv_head)
    kv_ptr = cache_ptr + tl.where(is_v, cache_stride_kv, 0) + kv_head * STRIDE_HEAD
    kv_ptr += (slot // BLOCK_SIZE) * STRIDE_BLOCK + (slot % BLOCK_SIZE) * STRIDE_TOKEN + col
    stored = mask & (head >= NUM_HEADS) & (slot >= 0)
    cell_dtype: tl.constexpr = cache_ptr.dtype.element_ty
    if scales_ptr is None:
        first, second = first.to(cell_dtype), second.to(cell_dtype)
    else:
        a, b = first.to(tl.float32), second.to(tl.float32)
        largest = tl.max(tl.maximum(size_bits(a), size_bits(b)), axis=1)[:, None]
        bits = scale_bits(largest, cell_dtype)
        scale = bits.to(tl.float32, bitcast=True) + tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
        first, second = codes_of(a, scale, cell_dtype), codes_of(b, scale, cell_dtype)
        cell = ((slot // BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
        is_cell = (head >= NUM_HEADS) & (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (slot >= 0)
        tl.store(scales_ptr + 2 * cell + is_v.to(tl.int32), (bits >> 16).to(tl.int16), mask=is_cell)
    tl.store(kv_ptr, first, mask=stored)
    tl.store(kv_ptr + HALF, second, mask=stored)


def qkv_rope_store_triton(qkv: Tensor, heads: HeadInputs, cache: LayerCache, shape: AttentionShape) -> Tensor:
    """See `qkv_rope_store.qkv_rope_store`; the last dimension of every tensor is contiguous."""
    cos_sin, slot_mapping, q_norm_weight, k_norm_weight, eps = heads
    num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    num_tokens = qkv.shape[0]
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if not num_tokens:
        return q
    all_heads = num_heads + 2 * num_kv_heads
    block_half = next_power_of_2(head_dim // 2)
    block_heads = min(max(ELEMENTS // block_half, 1), next_power_of_2(all_heads))
    data, scales = data_of(cache), None if cache.scales is None else cache.scales.view(torch.int16)
    launch(
        _qkv_rope_store_kernel, (num_tokens, cdiv(all_heads, block_heads)), qkv.device,
        qkv, cos_sin, q_norm_weight, k_norm_weight, slot_mapping, q, data, scales,
        qkv.stride(0), 0 if cos_sin is None else cos_sin.stride(0), *data.stride()[:4], eps,
        ROPE=cos_sin is not None, Q_NORM=q_norm_weight is not None, K_NORM=k_norm_weight is not None,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2, BLOCK_SIZE=cache.block_size,
        BLOCK_HEADS=block_heads, BLOCK_HALF=block_half, num_warps=4,
    )  # fmt: skip
    return q
