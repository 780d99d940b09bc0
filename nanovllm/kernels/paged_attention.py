"""Paged attention (Kwon et al., 2023): causal attention of new tokens over keys and values that lie in blocks.

Owns the meaning, in plain PyTorch and one request at a time; the backends in `attention/` equal it. Invariant: the
output of a request depends on its own blocks and queries only; rows of padding (a request of length 0) give zeros.

    context of a request   0 .................. seq_len - query_len .......... seq_len
    its queries                                 [ j = 0, 1, ...            ]
    query j sees keys                0 .. p (only the last `window`),  p = seq_len - query_len + j
"""

import torch
from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.cache_codes import cells


def paged_attention_reference(
    q: Tensor, cache: LayerCache, meta: AttentionMetadata, shape: AttentionShape, sinks: Tensor | None = None
) -> Tensor:
    """q [num_tokens, num_heads, head_dim] -> the same shape and dtype; with a value_dim, [.., value_dim].

    The keys and values of this step are in the cache already. Consecutive query heads share a KV head. sinks
    [num_heads] float32: of each head the score of a key that every query sees and whose value is 0 (Xiao et al., 2024),
    so that its weights sum to less than 1; a scale or a soft-cap does not apply to it.
    """
    out = q.new_zeros(*q.shape[:2], shape.value_dim or shape.head_dim)
    group, window, softcap = shape.num_heads // shape.num_kv_heads, shape.window, shape.softcap
    starts = meta.query_start_loc.tolist()
    for i, seq_len in enumerate(meta.seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        query_len = rows.stop - rows.start
        if query_len == 0 or seq_len == 0:
            continue
        num_blocks = -(-seq_len // cache.block_size)
        blocks = meta.block_table[i, :num_blocks].long()
        context = cells(cache, blocks, rank=shape.value_dim).transpose(1, 2).flatten(2, 3)[:, :, :seq_len]
        # [1 or 2, num_kv_heads, seq_len, head_dim]
        planes = context.float().repeat_interleave(group, dim=1)
        keys, values = planes[0], planes[-1][..., : shape.value_dim]
        positions = torch.arange(seq_len - query_len, seq_len, device=q.device)[:, None]
        distance = positions - torch.arange(seq_len, device=q.device)  # [query_len, seq_len]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        scores = q[rows].float().transpose(0, 1) @ keys.transpose(1, 2) * shape.scale  # [num_heads, query_len, seq_len]
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, query_len, 1)), dim=-1)
        weights = scores.softmax(-1)[..., :seq_len]
        out[rows] = (weights @ values).transpose(0, 1).to(q.dtype)
    return out
