"""Tiles of latents in attention kernels: one load of a tile serves as keys and as values, for all heads.

Owns the online softmax over such tiles, and how heads are put into programs; `tiles.py` has the arithmetic. Invariant:
as in `tiles.py`.

A query is two parts beside each other, as a row of the cache is: `rank` numbers that score latents, and rope_dim that
score the part with the position. Each is a product of its own, so that no tile is padded to a power of 2 of the sum.
"""

from functools import cache
from typing import Any

import triton
import triton.language as tl

from nanovllm.kernels.attention_types import AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.cells import key_scales, load_pairs, numbers_of
from nanovllm.kernels.triton.attention.tiles import (
    LOG2_E,
    blocks_of_tile,
    offsets_of_tile,
    update_softmax,
)
from nanovllm.kernels.triton.common.sizes import next_power_of_2

MAX_GROUP = 16  # heads that one program takes through a tile


@triton.jit
def load_query(
    row_ptr, row_mask,
    RANK: tl.constexpr, BLOCK_RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_ROPE: tl.constexpr,
):  # fmt: skip
    """Both parts of the queries whose rows begin at row_ptr [ROWS]."""
    rank, rope = tl.arange(0, BLOCK_RANK)[None, :], tl.arange(0, BLOCK_ROPE)[None, :]
    q = tl.load(row_ptr[:, None] + rank, mask=row_mask[:, None] & (rank < RANK), other=0.0)
    q_rope = tl.load(row_ptr[:, None] + RANK + rope, mask=row_mask[:, None] & (rope < ROPE), other=0.0)
    return q, q_rope


@triton.jit
def attend_latents(
    top,
    norm,
    acc,
    q,
    q_rope,
    cache_ptr,
    pairs_ptr,
    table_ptr,
    blocks,
    query_position,
    begin,
    end,
    whole_to,
    seq_len,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    scale,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    RAGGED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """The online softmax over tiles begin .. end, of which every query sees those before whole_to whole.

    pairs_ptr: `pairs_of`'s, None where there are no codes. blocks: `blocks_of_tile`'s for the first. query_position: a
    number or [ROWS, 1]. RAGGED: a tile may reach beyond the last token, where anything may lie.
    """
    rank, rope, in_tile = tl.arange(0, BLOCK_RANK)[None, :], tl.arange(0, BLOCK_ROPE)[None, :], tl.arange(0, TILE)
    for t in tl.range(begin, end, num_stages=NUM_STAGES):
        offset = offsets_of_tile(blocks, t * TILE, 0, STRIDE_BLOCK, 0, STRIDE_TOKEN, TILE, BLOCK_SIZE)
        row_ptr = cache_ptr + offset[:, None]
        if RAGGED:
            is_token = (in_tile < seq_len - t * TILE)[:, None]
            latent = tl.load(row_ptr + rank, mask=is_token & (rank < RANK), other=0.0)
            key = tl.load(row_ptr + RANK + rope, mask=is_token & (rope < ROPE), other=0.0)
        elif BLOCK_RANK == RANK and BLOCK_ROPE == ROPE:
            latent, key = tl.load(row_ptr + rank), tl.load(row_ptr + RANK + rope)
        else:
            latent = tl.load(row_ptr + rank, mask=rank < RANK, other=0.0)
            key = tl.load(row_ptr + RANK + rope, mask=rope < ROPE, other=0.0)
        pairs = None
        if pairs_ptr is not None:
            pairs = load_pairs(pairs_ptr, blocks, t, seq_len, 0, 1, BLOCK_SIZE, TILE, RAGGED)
            latent, key = numbers_of(latent, q), numbers_of(key, q)
        # Read one tile ahead, so that the loads above never wait for it and can be pipelined.
        blocks = blocks_of_tile(table_ptr, (t + 1) * TILE, seq_len, TILE, BLOCK_SIZE)
        scores = tl.dot(q_rope.to(key.dtype), tl.trans(key), input_precision="ieee")
        if pairs is None:
            scores = tl.dot(q, tl.trans(latent), scores, input_precision="ieee")
        else:
            scale_of_latent = (pairs & -65536).to(tl.float32, bitcast=True)
            by_latent = tl.dot(q.to(latent.dtype), tl.trans(latent), input_precision="ieee")
            scores = scores * key_scales(pairs)[None, :] + by_latent * scale_of_latent[None, :]
        if t >= whole_to:
            scores = tl.where(in_tile[None, :] <= query_position - t * TILE, scores, float("-inf"))
        top, norm, acc = update_softmax(top, norm, acc, scores, latent, pairs, scale, 0.0)
    return top, norm, acc


def in_groups(cache: LayerCache, num_heads: int) -> LayerCache:
    """The cache as if there were a KV head for each group of heads that one program takes; all are the same one.

    The groups are as many as they must be, and equal.
    """
    num_groups = next(n for n in range(1, num_heads + 1) if num_heads % n == 0 and num_heads // n <= MAX_GROUP)
    return LayerCache(cache.data.expand(-1, -1, num_groups, -1, -1))


@cache
def latent_arguments(shape: AttentionShape, block_size: int, num_groups: int) -> dict[str, Any]:
    """What both attention kernels are told of a layer, by the names of their parameters; not to be changed."""
    assert shape.value_dim is not None
    rope_dim = shape.head_dim - shape.value_dim
    return {
        "scale": shape.scale * LOG2_E,
        "NUM_GROUPS": num_groups,
        "GROUP": shape.num_heads // num_groups,
        "RANK": shape.value_dim,
        "BLOCK_RANK": max(16, next_power_of_2(shape.value_dim)),  # tl.dot takes no less
        "ROPE": rope_dim,
        "BLOCK_ROPE": max(16, next_power_of_2(rope_dim)),
        "BLOCK_SIZE": block_size,
    }
