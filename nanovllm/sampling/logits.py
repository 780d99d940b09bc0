"""From logits to a token: temperature, the three filters, and the two ways to pick.

Owns the arithmetic, as pure functions on logits [n, V] with one parameter a row; does not know requests or batches.
Invariant: each row is computed from that row alone, so its result does not depend on the rows beside it. A filtered-out
token is -inf.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MASKED = float("-inf")
# Logits handled at a time, by device type; callers that compute logits for this alone keep to as many. On a CPU,
# float32 temporaries then stay in the cache.
CHUNK = {"cpu": 2**21, "cuda": 2**24}
_ARGMAX_BLOCK = 256
_DRAW_BLOCK = 128
_CANDIDATE_BLOCK = 32


def rows_of_chunk(device: torch.device, row_size: int) -> int:
    """How many rows of that many numbers are handled at a time."""
    return max(1, CHUNK[device.type] // row_size)


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits [n, V] of any float dtype divided by temperature [n] > 0, in float32.

    |logit| / temperature must fit in float32: at the lowest temperature, 1e-5, logits may reach 1e33.
    """
    return logits / temperature[:, None]  # promoted to temperature's float32 in the same pass


def apply_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Keep tokens whose probability is at least min_p [n] times the highest one (Nguyen et al., 2024); 0 keeps all."""
    return logits.masked_fill(logits - logits.amax(-1, keepdim=True) < min_p.log()[:, None], MASKED)


def apply_top_k(logits: Tensor, top_k: Tensor, max_top_k: int) -> Tensor:
    """Keep the top_k [n] highest logits and all that are tied with the lowest of them; 0, or k >= V, keeps all.

    max_top_k: a bound of top_k that the host knows.
    """
    highest = logits.topk(max(1, min(max_top_k, logits.shape[1])), dim=-1).values
    last = top_k.clamp(1, highest.shape[1]).long()[:, None] - 1
    kth = highest.gather(1, last).masked_fill(((top_k < 1) | (top_k >= logits.shape[1]))[:, None], MASKED)
    return logits.masked_fill(logits < kth, MASKED)


def apply_top_p(logits: Tensor, top_p: Tensor, outside: Tensor | None = None) -> Tensor:
    """Keep the shortest prefix, in falling order, whose probability reaches top_p [n] (Holtzman et al., 2020).

    At least one token stays; among equal logits lower ids come first, so ties are cut; 1 keeps all. outside [n]: the
    weight of tokens that are not in `logits`, in units of the highest one's. Sorts whole rows: for short ones.
    """
    highest = logits.amax(-1, keepdim=True)
    total = (logits - highest).exp().sum(-1, keepdim=True, dtype=torch.float64)
    wanted = top_p[:, None] * (total if outside is None else total + outside[:, None])
    keep = is_in_prefix(logits, highest, torch.zeros_like(wanted), wanted) | (top_p[:, None] >= 1)
    return logits.masked_fill(~keep, MASKED)


def is_in_prefix(logits: Tensor, highest: Tensor, before: Tensor, wanted: Tensor) -> Tensor:
    """Which tokens, in falling order and from the first one on, still start below the weight `wanted`; bool [n, width].

    before [n, 1]: the weight of the tokens above these; the unit is the weight of a logit of `highest` [n, 1].
    """
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    weights = (values - highest).exp().double()
    keep = before + weights.cumsum(-1) - weights < wanted
    keep[:, 0] = True
    return torch.empty_like(keep).scatter_(1, order, keep)


def find_candidates(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` highest logits of each row and their ids, both [n, width], in order of id; needs width <= V.

    Every token that is not among them is at most as high as the lowest of them. Blocks whose highest logit is not among
    the `width` highest of all blocks cannot hold a candidate, so most of the row is read once and never sorted.
    """
    num_rows, vocab_size = logits.shape
    if vocab_size % _CANDIDATE_BLOCK or vocab_size < 4 * _CANDIDATE_BLOCK * width:
        ids = logits.topk(width, dim=-1, sorted=False).indices.sort(-1).values
        return logits.gather(1, ids), ids
    blocks = logits.unflatten(1, (-1, _CANDIDATE_BLOCK))
    block_ids = blocks.amax(-1).topk(width, dim=-1, sorted=False).indices
    flat_ids = block_ids + torch.arange(num_rows, device=logits.device)[:, None] * blocks.shape[1]
    pool = blocks.flatten(0, 1).index_select(0, flat_ids.flatten()).view(num_rows, -1)
    values, places = pool.topk(width, dim=-1, sorted=False)
    ids = block_ids.gather(1, places // _CANDIDATE_BLOCK) * _CANDIDATE_BLOCK + places % _CANDIDATE_BLOCK
    ids, order = ids.sort(-1)
    return values.gather(1, order), ids


def pick_highest(logits: Tensor) -> Tensor:
    """argmax of each row, the lowest id on a tie. logits [n, V] of any float dtype; returns int64 [n].

    Maxima of blocks first: a plain reduction is several times faster than one that carries indices, bf16 above all.
    """
    block = _reduce_blocks(logits, _ARGMAX_BLOCK, torch.amax).argmax(-1, keepdim=True)
    ids = _block_ids(block, _ARGMAX_BLOCK, logits).clamp(max=logits.shape[1] - 1)  # repeats of the last id lose ties
    return ids.gather(1, logits.gather(1, ids).argmax(-1, keepdim=True))[:, 0]


def pick_by_weight(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw: the lowest id whose running sum of weights exceeds uniform times their total.

    weights [n, V] float32 >= 0, uniform [n] in [0, 1); returns int64 [n], always in [0, V). Two levels, first the block
    of 128 tokens and then the token, with running sums in float64: the order of additions, which differs between
    devices and kernels, then moves a boundary by about 2**-24 of a block's weight at most. A token of weight 0 is never
    picked while another has some; a row of NaN, which has no right answer, gives some id in range.
    """
    sums = _reduce_blocks(weights, _DRAW_BLOCK, torch.sum).cumsum(-1, dtype=torch.float64)
    target = sums[:, -1:] * uniform.double()[:, None]
    block = (sums <= target).sum(-1, keepdim=True).clamp(max=sums.shape[1] - 1)
    target = target - sums.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
    ids = _block_ids(block, _DRAW_BLOCK, weights)
    inside = weights.gather(1, ids.clamp(max=weights.shape[1] - 1)).masked_fill(ids >= weights.shape[1], 0.0)
    reached = inside.cumsum(-1, dtype=torch.float64)
    target = target.minimum(reached[:, -1:] * (1 - 2.0**-30))  # the block's float32 sum may be a little above this one
    place = (reached <= target).sum(-1, keepdim=True).clamp(max=_DRAW_BLOCK - 1)
    return ids.gather(1, place)[:, 0].clamp(max=weights.shape[1] - 1)


def _block_ids(block: Tensor, size: int, like: Tensor) -> Tensor:
    """Ids of the tokens of one block a row, [n, size]; the last block's may exceed V."""
    return block * size + torch.arange(size, device=like.device)


def _reduce_blocks(values: Tensor, size: int, reduce: Callable[..., Tensor]) -> Tensor:
    """`reduce` over blocks of `size` tokens, [n, ceil(V / size)]; the last block may be short."""
    whole = values.shape[1] // size * size
    parts = []
    if whole:
        parts.append(reduce(values[:, :whole].unflatten(1, (-1, size)), dim=-1))
    if whole < values.shape[1]:
        parts.append(reduce(values[:, whole:], dim=-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
