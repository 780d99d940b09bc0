"""Attention over latents on a CPU (MLA; DeepSeek-AI, 2024), by PyTorch's products.

Owns how a step's requests become products. Invariant: work grows with the blocks that are read, and room with a bound.

All heads of a request stand below each other as the rows of one matrix, since they see the same keys:

    scores [queries x heads, keys] = queries [queries x heads, rank + rope] x rows of the cache [keys, rank + rope]
    output [queries x heads, rank] = weights x the first `rank` numbers of these rows
"""

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.attention.cpu_paged import CpuPagedBackend, PreparedStep
from nanovllm.attention.latent import LatentBackend, LatentStep
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.cache_codes import cells

MAX_SCORES = 2**23  # that are in memory at a time


@dataclass(frozen=True)
class PreparedLatentStep(PreparedStep, LatentStep):
    pass


class CpuLatentBackend(CpuPagedBackend, LatentBackend):
    """Layers of another kind are the other backend's."""

    def prepare(self, meta: AttentionMetadata) -> PreparedLatentStep:
        return PreparedLatentStep(meta)

    def forward(
        self, shape: AttentionShape, q: Tensor, cache: LayerCache, prepared: PreparedStep, sinks: Tensor | None = None
    ) -> Tensor:
        """Equals `kernels.paged_attention` up to rounding."""
        if shape.value_dim is None or not isinstance(prepared, PreparedLatentStep):
            return super().forward(shape, q, cache, prepared, sinks)
        meta, start = prepared.meta if prepared.whole_from is None else prepared.decodes, 0
        out = q.new_empty(*q.shape[:2], shape.value_dim)
        lens = zip(meta.query_lens_host, meta.seq_lens_host, strict=True)
        for (query_len, seq_len), group in groupby(enumerate(lens), key=lambda item: item[1]):
            requests = [i for i, _ in group]
            rows = slice(start, start + len(requests) * query_len)
            table = meta.block_table[requests[0] : requests[-1] + 1, : -(-seq_len // cache.block_size)]
            keys = cells(cache, table.flatten(), rank=shape.value_dim)[0, :, 0].to(q.dtype)
            keys = keys.view(len(requests), -1, keys.shape[2])[:, :seq_len]  # of [blocks, block_size, rank + rope_dim]
            _attend(q[rows].view(len(requests), query_len, *q.shape[1:]), keys, shape, out[rows])
            start = rows.stop
        return out

    def whole_from(self, prepared: PreparedLatentStep) -> int | None:
        return prepared.whole_from

    def forward_whole(
        self, q: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, scale: float, prepared: PreparedLatentStep
    ) -> Tensor:
        lens = list(prepared.meta.query_lens_host[prepared.meta.num_decodes :])
        k, v = kv.tensor_split([q.shape[2]], dim=2)
        queries, keys = torch.cat((q, q_rope), -1), torch.cat((k, k_rope[:, None].expand_as(q_rope)), -1)
        padded = F.pad(v, (0, max(0, keys.shape[2] - v.shape[2])))  # the fast form wants them as wide as keys
        found = []
        for parts in zip(*(x.split(lens) for x in (queries, keys, padded)), strict=True):
            one_q, one_k, one_v = (part.transpose(0, 1).unsqueeze(0) for part in parts)
            one = F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True, scale=scale)
            found.append(one[0].transpose(0, 1))
        return torch.cat(found)[..., : v.shape[2]]


def _attend(q: Tensor, keys: Tensor, shape: AttentionShape, out: Tensor) -> None:
    """q [n, query_len, num_heads, head_dim], keys [n, seq_len, head_dim], out [n * query_len, num_heads, value_dim]."""
    (n, query_len, num_heads, _), seq_len = q.shape, keys.shape[1]
    out = out.view(n, query_len, num_heads, -1)
    step = max(1, MAX_SCORES // (n * num_heads * seq_len))
    for first in range(0, query_len, step):
        some = q[:, first : first + step]
        seen = seq_len - query_len + first + some.shape[1]  # by the last of these queries
        scores = some.flatten(1, 2) @ keys[:, :seen].transpose(1, 2)
        scores = scores.view(n, some.shape[1], num_heads, seen).mul_(shape.scale)
        if some.shape[1] > 1:
            hidden = torch.ones(some.shape[1], seen, dtype=torch.bool).triu_(seen - some.shape[1] + 1)
            scores.masked_fill_(hidden[:, None], float("-inf"))
        weights = scores.softmax(-1).flatten(1, 2)
        out[:, first : first + step] = (weights @ keys[:, :seen, : shape.value_dim]).unflatten(1, (-1, num_heads))
