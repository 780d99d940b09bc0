"""Causal attention of new tokens over keys and values that lie in blocks (PagedAttention, Kwon et al., 2023).

Owns the meaning, in plain PyTorch and one request at a time; the backends in `attention/` equal it. Invariant: the
output of a request depends on its own blocks and queries only; rows of padding (a request of length 0) give zeros.

    context of a request   0 .................. seq_len - query_len .......... seq_len
    its queries                                 [ j = 0, 1, ...            ]
    query j sees keys                0 .. p (only the last `window`),  p = seq_len - query_len + j
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class PagedBatch(Protocol):
    """What a kernel reads of `attention.metadata.AttentionMetadata`, which explains each field."""

    @property
    def query_start_loc(self) -> Tensor: ...
    @property
    def seq_lens(self) -> Tensor: ...
    @property
    def block_table(self) -> Tensor: ...
    @property
    def num_decodes(self) -> int: ...
    @property
    def num_reqs(self) -> int: ...
    @property
    def max_query_len(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def query_lens_host(self) -> Sequence[int]: ...
    @property
    def seq_lens_host(self) -> Sequence[int]: ...


def paged_attention_reference(
    q: Tensor, kv_cache: Tensor, meta: PagedBatch, scale: float, window: int | None, softcap: float | None = None
) -> Tensor:
    """q [num_tokens, num_heads, head_dim] -> the same shape and dtype.

    kv_cache [2, num_blocks, num_kv_heads, block_size, head_dim] with any strides; the keys and values of this step are
    already in it. num_heads is a multiple of num_kv_heads; consecutive query heads share one. softcap: a score s, times
    `scale`, becomes softcap * tanh(s / softcap) before the softmax.
    """
    out = torch.zeros_like(q)
    group = q.shape[1] // kv_cache.shape[2]
    starts = meta.query_start_loc.tolist()
    for i, seq_len in enumerate(meta.seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        query_len = rows.stop - rows.start
        if query_len == 0 or seq_len == 0:
            continue
        num_blocks = -(-seq_len // kv_cache.shape[3])
        blocks = meta.block_table[i, :num_blocks].long()
        context = (
            kv_cache[:, blocks].transpose(1, 2).flatten(2, 3)[:, :, :seq_len]
        )  # [2, num_kv_heads, seq_len, head_dim]
        keys, values = context.float().repeat_interleave(group, dim=1)
        positions = torch.arange(seq_len - query_len, seq_len, device=q.device)[:, None]
        distance = positions - torch.arange(seq_len, device=q.device)  # [query_len, seq_len]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = q[rows].float().transpose(0, 1) @ keys.transpose(1, 2) * scale  # [num_heads, query_len, seq_len]
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = (weights @ values).transpose(0, 1).to(q.dtype)
    return out
