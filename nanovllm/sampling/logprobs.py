"""Log-probabilities of tokens, and of the most likely ones beside them, over the whole vocabulary.

Owns the arithmetic, as a pure function on raw logits: before temperature, penalties and filters. Invariant: each row is
computed from that row alone, in float32, and memory beyond the result is bounded by CHUNK.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**24  # logits handled at a time; callers that compute logits for it alone keep to as many


class TopLogprobs(NamedTuple):
    """Per row the token itself, then the k most likely tokens in falling order, ties by id; each [n, 1 + k]."""

    token_ids: Tensor  # int64
    logprobs: Tensor  # float32
    ranks: Tensor  # int64: 1 + how many tokens are more likely


def top_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> TopLogprobs:
    """logits [n, V] of any float dtype, token_ids [n] in [0, V), 0 <= k <= V."""
    size = max(1, CHUNK // logits.shape[1])
    parts = [
        _of_chunk(logits[i : i + size].float().log_softmax(-1), token_ids[i : i + size, None].long(), k)
        for i in range(0, len(logits), size)
    ]
    return parts[0] if len(parts) == 1 else TopLogprobs(*map(torch.cat, zip(*parts, strict=True)))


def _of_chunk(logprobs: Tensor, own_ids: Tensor, k: int) -> TopLogprobs:
    own = logprobs.gather(1, own_ids)
    own_rank = 1 + (logprobs > own).sum(-1, keepdim=True)
    values, ids = _highest(logprobs, k)
    falling = -values  # rising, as searchsorted wants it; the first of equals says how many are before all of them
    ranks = 1 + torch.searchsorted(falling, falling)
    return TopLogprobs(*(torch.cat(pair, dim=1) for pair in ((own_ids, ids), (own, values), (own_rank, ranks))))


def _highest(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the k highest of each row. Lower ids win ties, which topk alone leaves to chance.

    It looks at 64-bit keys: the float's bits, as an integer that grows with it, above the complement of the id.
    """
    bits = logprobs.view(torch.int32)
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    last = logprobs.shape[1] - 1
    keys = (rising << 32) + (last - torch.arange(last + 1, device=logprobs.device))
    ids = last - (keys.topk(k, dim=-1).values & 0xFFFFFFFF)
    return logprobs.gather(1, ids), ids
