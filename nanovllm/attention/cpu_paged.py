"""Paged attention that is fast on a CPU: decodes by the C++ kernel where it applies, else by PyTorch's operations.

Owns the indices of a step, built once and used by every layer. Invariant: work grows with the blocks that are read,
never with the longest request of the batch. PyTorch's operations take two paths:

    a few requests, or prompts   copy their blocks side by side, then scaled_dot_product_attention
    many decoding requests       batched products straight over the cache, one per (block, KV head), no copy of it:

        pairs    one per (request, block it reads), in the order of the cache  [P]
        scores   q of the pair's request x keys of the pair's block            [P * heads, block_size]
        softmax  in the order of the requests, a bucket of similar lengths at a time
        output   weights x values per pair, summed over the pairs of a request
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.native import NativeKernels

MIN_BATCHED_DECODES = 4  # below this, a call per request costs less than the batched path's fixed price
MAX_UNUSED_SHARE = 1.25  # blocks in the stretch per block needed, up to which reading in place beats copying


@dataclass(frozen=True)
class _Bucket:
    rows: Tensor  # rows of `scores` that make one row of the softmax, in context order
    mask: Tensor  # [requests, 1, positions], 0 or -inf


@dataclass(frozen=True)
class _DecodePlan:
    blocks: slice | Tensor  # the pairs' blocks: a stretch of the cache, or copied
    owners: Tensor  # [P] the request of each pair
    buckets: list[_Bucket]
    unsort: Tensor  # from the buckets' order back to the pairs'
    members: Tensor  # the pairs of request 0, of request 1, ...
    offsets: Tensor  # where each request begins in `members`


@dataclass(frozen=True)
class PreparedStep:
    """The step's metadata, and what this backend has worked out about it so far, by window."""

    meta: AttentionMetadata
    decode_plans: dict[int | None, _DecodePlan] = field(default_factory=dict)
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)


class CpuPagedBackend(AttentionBackend):
    """Equals `kernels.paged_attention` up to rounding; in bfloat16, PyTorch's paths round scores and weights to it."""

    def __init__(self, native: NativeKernels | None = None) -> None:
        """native: None keeps to PyTorch's operations."""
        self._native = native

    def prepare(self, meta: AttentionMetadata) -> PreparedStep:
        return PreparedStep(meta)

    def forward(self, shape: AttentionShape, q: Tensor, cache: LayerCache, prepared: PreparedStep) -> Tensor:
        """A contiguous cache is fastest. A soft-cap takes PyTorch's paths."""
        meta, window = prepared.meta, shape.window
        outputs, start = [], 0
        decoded = self._decode_natively(shape, q, cache, meta)
        if decoded is not None:
            if meta.num_decodes == meta.num_reqs:
                return decoded
            outputs.append(decoded)
            start = meta.num_decodes
        elif meta.num_decodes >= MIN_BATCHED_DECODES:
            start = meta.num_decodes
            if window not in prepared.decode_plans:
                prepared.decode_plans[window] = _plan_decodes(meta, shape, cache)
            outputs.append(_decode(shape, q[:start], cache, prepared.decode_plans[window]))
        lens = zip(meta.query_lens_host, meta.seq_lens_host, strict=True)
        for (query_len, seq_len), group in groupby(list(enumerate(lens))[start:], key=lambda item: item[1]):
            requests = [i for i, _ in group]
            stop = start + len(requests) * query_len
            table = meta.block_table[requests[0] : requests[-1] + 1]
            mask = _mask(prepared, query_len, seq_len, window)
            outputs.append(_attend(shape, q[start:stop], cache, table, query_len, seq_len, mask))
            start = stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode_natively(
        self, shape: AttentionShape, q: Tensor, cache: LayerCache, meta: AttentionMetadata
    ) -> Tensor | None:
        n, table, seq_lens = meta.num_decodes, meta.block_table, meta.seq_lens
        if self._native is None or n == 0:
            return None
        if n < meta.num_reqs:
            q, table, seq_lens = q[:n], table[:n], seq_lens[:n]
        return self._native.decode_attention(q, cache, table, seq_lens, shape)


def _attend(
    shape: AttentionShape,
    q: Tensor,
    cache: LayerCache,
    table: Tensor,
    query_len: int,
    seq_len: int,
    mask: Tensor | None,
) -> Tensor:
    """Requests of equal lengths, together: q [n * query_len, num_heads, head_dim]; mask [query_len, seq_len]."""
    scale, softcap = shape.scale, shape.softcap
    window = seq_len if shape.window is None else shape.window
    first = max(0, seq_len - query_len - window + 1) // cache.block_size  # blocks before it are seen by no query
    seq_len -= first * cache.block_size
    mask = None if mask is None else mask[:, first * cache.block_size :]
    blocks = table[:, first : first + -(-seq_len // cache.block_size)].flatten()
    n, by_head = table.shape[0], cache.data.transpose(1, 2)  # [2, num_kv_heads, num_blocks, block_size, head_dim]
    copied = by_head.index_select(2, blocks)
    context = copied.view(*by_head.shape[:2], n, -1, by_head.shape[4])[:, :, :, :seq_len]
    keys, values = context.transpose(1, 2)  # each [n, num_kv_heads, seq_len, head_dim]
    if query_len == 1:  # the heads that share keys stand in for queries
        grouped = q.reshape(n, keys.shape[1], -1, q.shape[2])
        if softcap is not None:
            return _capped_attention(grouped, keys, values, mask, scale, softcap).reshape(q.shape)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).reshape(q.shape)
    heads_first = q.reshape(n, query_len, *q.shape[1:]).transpose(1, 2)  # [n, num_heads, query_len, head_dim]
    causal = mask is None
    if softcap is not None:
        if causal:
            mask = torch.ones(query_len, seq_len, dtype=torch.bool).tril_()
        grouped = heads_first.unflatten(1, (keys.shape[1], -1))  # [n, num_kv_heads, group, query_len, head_dim]
        out = _capped_attention(grouped, keys.unsqueeze(2), values.unsqueeze(2), mask, scale, softcap)
        return out.flatten(1, 2).transpose(1, 2).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        heads_first, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)


def _capped_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """What scaled_dot_product_attention does, with softcap * tanh(score / softcap) for each score."""
    scores = (q @ keys.transpose(-1, -2)).mul_(scale / softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1) @ values


def _mask(prepared: PreparedStep, query_len: int, seq_len: int, window: int | None) -> Tensor | None:
    """None where every key is seen (one query) or the plain causal triangle applies (a whole prompt)."""
    width = window if window is not None and window < seq_len else seq_len
    if width == seq_len and query_len in (1, seq_len):
        return None
    key = (query_len, seq_len, width)
    if key not in prepared.masks:
        distance = torch.arange(seq_len - query_len, seq_len)[:, None] - torch.arange(seq_len)
        prepared.masks[key] = (distance >= 0) & (distance < width)
    return prepared.masks[key]


def _decode(shape: AttentionShape, q: Tensor, cache: LayerCache, plan: _DecodePlan) -> Tensor:
    (n, num_heads, head_dim), num_kv_heads, block_size = q.shape, shape.num_kv_heads, cache.block_size
    blocks = plan.blocks
    read = cache.data[:, blocks] if isinstance(blocks, slice) else cache.data.index_select(1, blocks)
    keys, values = read.flatten(1, 2)  # each [P * num_kv_heads, block_size, head_dim]
    q_pairs = (q.reshape(n, -1) * shape.scale).index_select(0, plan.owners)
    q_pairs = q_pairs.view(-1, num_heads // num_kv_heads, head_dim)  # [P * num_kv_heads, group, head_dim]
    scores = torch.bmm(q_pairs, keys.transpose(1, 2)).view(-1, block_size)  # [P * num_heads, block_size]
    if shape.softcap is not None:
        scores = scores.div_(shape.softcap).tanh_().mul_(shape.softcap)
    weights = []
    for bucket in plan.buckets:
        rows = scores.index_select(0, bucket.rows).view(bucket.mask.shape[0], num_heads, -1)
        weights.append(rows.add_(bucket.mask).softmax(-1).view(-1, block_size))
    sorted_weights = weights[0] if len(weights) == 1 else torch.cat(weights)
    pair_weights = sorted_weights.index_select(0, plan.unsort).view(*q_pairs.shape[:2], block_size)
    partial = torch.bmm(pair_weights, values).view(-1, num_heads * head_dim)  # [P, num_heads * head_dim]
    return F.embedding_bag(plan.members, partial, plan.offsets, mode="sum").view(q.shape)


def _plan_decodes(meta: AttentionMetadata, shape: AttentionShape, cache: LayerCache) -> _DecodePlan:
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
        mask = torch.zeros(hidden.shape, dtype=cache.data.dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
        buckets.append(_Bucket(torch.from_numpy(rows.ravel()), mask.unsqueeze(1)))
        places = base + np.arange(rows.size).reshape(rows.shape).transpose(0, 2, 1)  # [requests, width, num_heads]
        unsort[grid[inside]] = places[inside]
        base += rows.size
    return _DecodePlan(
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
