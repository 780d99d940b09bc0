"""Paged attention of many decoding requests on a CPU: batched products straight over the cache, no copy of it.

Owns the indices of these products, planned once a step. Invariant: work grows with the blocks that are read.

    pairs    one per (request, block it reads), in the order of the cache  [P]
    scores   q of the pair's request x keys of the pair's block            [P * heads, block_size]
    softmax  in the order of the requests, a bucket of similar lengths at a time
    output   weights x values per pair, summed over the pairs of a request
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.attention.softmax_variants import softmax_with
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.cache_codes import cells

MAX_UNUSED_SHARE = 1.25  # blocks in the stretch per block needed, up to which reading in place beats copying


@dataclass(frozen=True)
class _Bucket:
    rows: Tensor  # rows of `scores` that make one row of the softmax, in context order
    mask: Tensor  # [requests, 1, positions], 0 or -inf


@dataclass(frozen=True)
class DecodePlan:
    blocks: slice | Tensor  # the pairs' blocks: a stretch of the cache, or copied
    owners: Tensor  # [P] the request of each pair
    buckets: list[_Bucket]
    unsort: Tensor  # from the buckets' order back to the pairs'
    members: Tensor  # the pairs of request 0, of request 1, ...
    offsets: Tensor  # where each request begins in `members`


def batched_decode(
    shape: AttentionShape, q: Tensor, cache: LayerCache, plan: DecodePlan, sinks: Tensor | None = None
) -> Tensor:
    (n, num_heads, head_dim), num_kv_heads, block_size = q.shape, shape.num_kv_heads, cache.block_size
    keys, values = cells(cache, plan.blocks).to(q.dtype).flatten(1, 2)  # each [P * num_kv_heads, block_size, head_dim]
    q_pairs = (q.reshape(n, -1) * shape.scale).index_select(0, plan.owners)
    q_pairs = q_pairs.view(-1, num_heads // num_kv_heads, head_dim)  # [P * num_kv_heads, group, head_dim]
    scores = torch.bmm(q_pairs, keys.transpose(1, 2)).view(-1, block_size)  # [P * num_heads, block_size]
    if shape.softcap is not None:
        scores = scores.div_(shape.softcap).tanh_().mul_(shape.softcap)
    weights, column = [], None if sinks is None else sinks[:, None]
    for bucket in plan.buckets:
        rows = scores.index_select(0, bucket.rows).view(bucket.mask.shape[0], num_heads, -1)
        weights.append(softmax_with(rows.add_(bucket.mask), column).reshape(-1, block_size))
    sorted_weights = weights[0] if len(weights) == 1 else torch.cat(weights)
    pair_weights = sorted_weights.index_select(0, plan.unsort).view(*q_pairs.shape[:2], block_size)
    partial = torch.bmm(pair_weights, values).view(-1, num_heads * head_dim)  # [P, num_heads * head_dim]
    return F.embedding_bag(plan.members, partial, plan.offsets, mode="sum").view(q.shape)


def plan_decodes(meta: AttentionMetadata, shape: AttentionShape, cache: LayerCache, dtype: torch.dtype) -> DecodePlan:
    n, block_size, num_heads, window = meta.num_decodes, cache.block_size, shape.num_heads, shape.window
    seq_lens = np.array(meta.seq_lens_host[:n])
    starts = np.maximum(seq_lens - window, 0) if window is not None else np.zeros_like(seq_lens)  # first position seen
    first = starts // block_size
    counts = -(-seq_lens // block_size) - first  # blocks that each request reads
    offsets = counts.cumsum() - counts
    owners = np.arange(n).repeat(counts)
    nth = np.arange(counts.sum()) - offsets.repeat(counts)  # 0, 1, ... within each request
    blocks = meta.block_table.numpy()[owners, nth + first.repeat(counts)]

    low, stretch = int(blocks.min()), int(blocks.max() - blocks.min()) + 1
    in_place = stretch <= MAX_UNUSED_SHARE * len(blocks) and len(np.unique(blocks)) == len(blocks)
    pairs = blocks - low if in_place else np.arange(len(blocks))
    pair_owners = np.zeros(stretch if in_place else len(blocks), dtype=np.int64)  # unused blocks: computed, never read
    pair_owners[pairs] = owners

    heads = np.arange(num_heads)[:, None]
    unsort = np.zeros((len(pair_owners), num_heads), dtype=np.int64)
    buckets, base = [], 0
    for requests in _similar_lengths(counts):
        width = counts[requests].max()
        inside = np.arange(width) < counts[requests, None]  # [requests, width]
        grid = np.zeros_like(inside, dtype=np.int64)
        grid[inside] = pairs[(offsets[requests, None] + np.arange(width))[inside]]
        rows = grid[:, None] * num_heads + heads  # [requests, num_heads, width]
        positions = first[requests, None] * block_size + np.arange(width * block_size)
        hidden = (positions >= seq_lens[requests, None]) | (positions < starts[requests, None])
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
        buckets.append(_Bucket(torch.from_numpy(rows.ravel()), mask.unsqueeze(1)))
        places = base + np.arange(rows.size).reshape(rows.shape).transpose(0, 2, 1)  # [requests, width, num_heads]
        unsort[grid[inside]] = places[inside]
        base += rows.size
    return DecodePlan(
        blocks=slice(low, low + stretch) if in_place else torch.from_numpy(blocks),
        owners=torch.from_numpy(pair_owners),
        buckets=buckets,
        unsort=torch.from_numpy(unsort.ravel()),
        members=torch.from_numpy(pairs.astype(np.int64)),
        offsets=torch.from_numpy(offsets),
    )


def _similar_lengths(counts: np.ndarray) -> Iterable[np.ndarray]:
    """Request numbers, longest first, split so that padding at most quadruples the softmax, the cheapest part."""
    order = np.argsort(-counts, kind="stable")
    while len(order):
        similar = counts[order] * 4 >= counts[order[0]]
        yield order[similar]
        order = order[~similar]
