"""Paged attention that is fast on a CPU: decodes by the C++ kernel where it applies, else by PyTorch's operations.

Owns the indices of a step, built once and used by every layer. Invariant: work grows with the blocks that are read,
never with the longest request of the batch. PyTorch's operations take two paths:

    a few requests, or prompts   copy their blocks side by side, then scaled_dot_product_attention
    many decoding requests       batched products straight over the cache (`cpu_batched_decode.py`)
"""

from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.attention.cpu_batched_decode import DecodePlan, batched_decode, plan_decodes
from nanovllm.attention.softmax_variants import attention_with
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.cache_codes import cells
from nanovllm.kernels.cpu.cpu_kernels import CpuKernels

MIN_BATCHED_DECODES = 4  # below this, a call per request costs less than the batched path's fixed price


@dataclass(frozen=True)
class PreparedStep:
    """The step's metadata, and what this backend has worked out about it so far, by window."""

    meta: AttentionMetadata
    decode_plans: dict[int | None, DecodePlan] = field(default_factory=dict)
    masks: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)


class CpuPagedBackend(AttentionBackend):
    """Equals `kernels.paged_attention` up to rounding; in bfloat16, PyTorch's paths round scores and weights to it."""

    def __init__(self, native: CpuKernels | None = None) -> None:
        """native: None keeps to PyTorch's operations."""
        self._native = native

    def prepare(self, meta: AttentionMetadata) -> PreparedStep:
        return PreparedStep(meta)

    def forward(
        self, shape: AttentionShape, q: Tensor, cache: LayerCache, prepared: PreparedStep, sinks: Tensor | None = None
    ) -> Tensor:
        """A contiguous cache is fastest. A soft-cap takes PyTorch's paths."""
        meta, window = prepared.meta, shape.window
        outputs, start = [], 0
        decoded = self._decode_natively(shape, q, cache, meta, sinks)
        if decoded is not None:
            if meta.num_decodes == meta.num_reqs:
                return decoded
            outputs.append(decoded)
            start = meta.num_decodes
        elif meta.num_decodes >= MIN_BATCHED_DECODES:
            start = meta.num_decodes
            if window not in prepared.decode_plans:
                prepared.decode_plans[window] = plan_decodes(meta, shape, cache, q.dtype)
            outputs.append(batched_decode(shape, q[:start], cache, prepared.decode_plans[window], sinks))
        lens = zip(meta.query_lens_host, meta.seq_lens_host, strict=True)
        for (query_len, seq_len), group in groupby(list(enumerate(lens))[start:], key=lambda item: item[1]):
            requests = [i for i, _ in group]
            stop = start + len(requests) * query_len
            table = meta.block_table[requests[0] : requests[-1] + 1]
            mask = _mask(prepared, query_len, seq_len, window)
            outputs.append(_attend(shape, q[start:stop], cache, table, query_len, seq_len, mask, sinks))
            start = stop
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode_natively(
        self, shape: AttentionShape, q: Tensor, cache: LayerCache, meta: AttentionMetadata, sinks: Tensor | None
    ) -> Tensor | None:
        n, table, seq_lens = meta.num_decodes, meta.block_table, meta.seq_lens
        if self._native is None or n == 0:
            return None
        if n < meta.num_reqs:
            q, table, seq_lens = q[:n], table[:n], seq_lens[:n]
        return self._native.decode_attention(q, cache, table, seq_lens, shape, sinks)


def _attend(
    shape: AttentionShape, q: Tensor, cache: LayerCache, table: Tensor, query_len: int, seq_len: int,
    mask: Tensor | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Requests of equal lengths, together: q [n * query_len, num_heads, head_dim]; mask [query_len, seq_len]."""
    window = seq_len if shape.window is None else shape.window
    first = max(0, seq_len - query_len - window + 1) // cache.block_size  # blocks before it are seen by no query
    seq_len -= first * cache.block_size
    mask = None if mask is None else mask[:, first * cache.block_size :]
    blocks = table[:, first : first + -(-seq_len // cache.block_size)].flatten()
    n, copied = table.shape[0], cells(cache, blocks, heads_first=True).to(q.dtype)
    context = copied.view(*copied.shape[:2], n, -1, copied.shape[4])[:, :, :, :seq_len]
    keys, values = context.transpose(1, 2)  # each [n, num_kv_heads, seq_len, head_dim]
    plain = shape.softcap is None and sinks is None
    attention = F.scaled_dot_product_attention if plain else attention_with(shape.softcap, sinks)
    if query_len == 1:  # the heads that share keys stand in for queries
        grouped = q.reshape(n, keys.shape[1], -1, q.shape[2])
        return attention(grouped, keys, values, attn_mask=mask, scale=shape.scale).reshape(q.shape)
    heads_first = q.reshape(n, query_len, *q.shape[1:]).transpose(1, 2)  # [n, num_heads, query_len, head_dim]
    out = attention(
        heads_first, keys, values, attn_mask=mask, is_causal=mask is None, scale=shape.scale, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)


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
