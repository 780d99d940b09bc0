"""Batch-invariant attention in Triton: each token by one program, from its first key to its last.

Owns the launch; `nanovllm/attention/batch_invariant.py` says what for. Invariant: what a program does depends on its
token's length, the window and the sizes of the model alone: nothing is split, so a token has the same output in any
batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.tiles import LOWEST, layer_arguments, scores_of_tile, update_softmax
from nanovllm.kernels.triton.common.sizes import next_power_of_2

TILE = 32  # keys at a time


@triton.jit(do_not_specialize=["table_stride"])
def _batch_invariant_attention_kernel(
    q_ptr,
    cache_ptr,
    out_ptr,
    seq_lens_ptr,
    table_ptr,
    table_stride,
    q_stride_token,
    q_stride_head,
    cache_stride_kv,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    seq_len = tl.load(seq_lens_ptr + token)
    lowest = tl.maximum(seq_len - WINDOW, 0) if WINDOW else 0
    row, dim = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    row_mask = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    q_offset = token * q_stride_token + (head * GROUP + row) * q_stride_head
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=row_mask, other=0.0)
    top = tl.full([BLOCK_GROUP], LOWEST, tl.float32)
    norm = tl.zeros([BLOCK_GROUP], tl.float32)
    acc = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for first in range(lowest // TILE * TILE, seq_len, TILE):
        position = first + tl.arange(0, TILE)
        visible = (position < seq_len) & (position >= lowest)
        blocks = tl.load(table_ptr + token * table_stride + position // BLOCK_SIZE, mask=position < seq_len, other=0)
        base = blocks.to(tl.int64) * STRIDE_BLOCK + head * STRIDE_HEAD
        offset = base + position % BLOCK_SIZE * STRIDE_TOKEN
        mask = visible[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(cache_ptr + offset[:, None] + dim[None, :], mask=mask, other=0.0)
        v = tl.load(cache_ptr + cache_stride_kv + offset[:, None] + dim[None, :], mask=mask, other=0.0)
        scores = tl.where(visible[None, :], scores_of_tile(q, k, scale, SOFTCAP), float("-inf"))
        top, norm, acc = update_softmax(top, norm, acc, scores, v, scale, SOFTCAP)
    result = acc / tl.where(norm > 0, norm, 1.0)[:, None]
    out_offset = (token * NUM_KV_HEADS + head) * GROUP * HEAD_DIM + row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_ptr + out_offset, result.to(out_ptr.dtype.element_ty), mask=row_mask)


def batch_invariant_attention_triton(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, shape: AttentionShape
) -> Tensor:
    """As `attention.batch_invariant.DecodeAttention`; the last dimensions of q and the cache are contiguous."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _batch_invariant_attention_kernel[(q.shape[0], shape.num_kv_heads)](
        q, cache.data, out, meta.seq_lens, meta.block_table, meta.block_table.stride(0), q.stride(0), q.stride(1),
        *cache.data.stride()[:4], **layer_arguments(shape, cache.block_size), TILE=TILE, WINDOW=shape.window or 0,
        BLOCK_GROUP=max(16, next_power_of_2(shape.num_heads // shape.num_kv_heads)), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
