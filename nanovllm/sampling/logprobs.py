"""Log-probabilities of tokens, and of the most likely ones beside them, over the whole vocabulary.

Owns the arithmetic, as a pure function on raw logits: before temperature, penalties and filters; on a GPU,
`kernels/triton/top_logprobs.py` does it for a few tokens a row. Invariant: each row is computed from that row alone, in
float32, and memory beyond the result is bounded by CHUNK.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.sampling.logits import rows_of_chunk

_BLOCK = 32


class TopLogprobs(NamedTuple):
    """Per row the token itself, then the k most likely tokens in falling order, ties by id; each [n, 1 + k]."""

    token_ids: Tensor  # int64
    logprobs: Tensor  # float32
    ranks: Tensor  # int64: 1 + how many tokens are more likely


def rows_at_once(device: torch.device, vocab_size: int, k: int) -> int:
    """How many rows' log-probabilities are worked out together: each of k takes as much as eight logits on the way."""
    return rows_of_chunk(device, vocab_size + 8 * k)


def top_logprobs(logits: Tensor, token_ids: Tensor, k: int, as_logits: bool = False) -> TopLogprobs:
    """logits [n, V] of any float dtype, token_ids [n] in [0, V), 0 <= k <= V. as_logits: no log-softmax."""
    size = rows_at_once(logits.device, logits.shape[1], k)
    parts = [
        _of_chunk(logits[i : i + size].float(), token_ids[i : i + size, None].long(), k, as_logits)
        for i in range(0, len(logits), size)
    ]
    return parts[0] if len(parts) == 1 else TopLogprobs(*map(torch.cat, zip(*parts, strict=True)))


def packed_logprobs(logits: Tensor, token_ids: Tensor, members: Tensor, k: int) -> Tensor:
    """`packed`, of the rows that `members` [m] int64 names. logits [n, V] of any float dtype, token_ids [n]."""
    if use_triton(logits):
        from nanovllm.kernels.triton.top_logprobs import MOST, top_logprobs_triton

        if k <= MOST:
            return top_logprobs_triton(logits, token_ids, members, k)
    return packed(top_logprobs(logits[members], token_ids[members], k))


def packed(top: TopLogprobs) -> Tensor:
    """The same in one tensor, int32 [n, 1 + k, 3]: `TOKEN_LOGPROB`s, so that one copy brings them to the host."""
    return torch.stack((top.token_ids.int(), top.logprobs.view(torch.int32), top.ranks.int()), dim=-1)


def _of_chunk(logits: Tensor, own_ids: Tensor, k: int, as_logits: bool) -> TopLogprobs:
    own_ranks = 1 + (logits > logits.gather(1, own_ids)).sum(-1, keepdim=True)
    ids = _highest(logits, k)
    falling = -logits.gather(1, ids)  # rising, as searchsorted wants it; the first of equals says how many come before
    ids, ranks = (
        torch.cat((own_ids, ids), dim=1),
        torch.cat((own_ranks, 1 + torch.searchsorted(falling, falling)), dim=1),
    )
    return TopLogprobs(ids, (logits if as_logits else logits.log_softmax(-1)).gather(1, ids), ranks)


def _highest(logits: Tensor, k: int) -> Tensor:
    """Ids of the k highest of each row, in falling order; lower ids win ties, which topk alone leaves to chance.

    The k blocks with the highest maxima, lower ones winning ties, hold them all: each has a token that is better than
    any in another block.
    """
    num_rows, vocab_size = logits.shape
    if vocab_size % _BLOCK or vocab_size <= _BLOCK * k:
        return _first_by_key(logits, torch.arange(vocab_size, device=logits.device).expand(num_rows, -1), k)
    blocks = logits.unflatten(1, (-1, _BLOCK))
    tops = blocks.amax(-1)
    chosen = _first_by_key(tops, torch.arange(tops.shape[1], device=logits.device).expand(num_rows, -1), k)
    ids = (chosen[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
    return _first_by_key(logits.gather(1, ids), ids, k)


def _first_by_key(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """Of ids [n, width] those of the k highest values, lower ids first among equals; values float32.

    By 64-bit keys: the float's bits, as an integer that grows with it, above the complement of the id.
    """
    bits = (values + 0.0).view(torch.int32)  # -0 becomes 0, which it equals
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return 0xFFFFFFFF - ((rising << 32) + (0xFFFFFFFF - ids)).topk(k, dim=-1).values.bitwise_and(0xFFFFFFFF)
