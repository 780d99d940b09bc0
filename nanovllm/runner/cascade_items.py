"""Items of a cascade: the prefixes that decodes share, cut into pieces of work that keep a whole device busy.

Owns the cut; `kernels/cascade.py` explains items, and its kernel works them off one after the other. Invariant: no
request gets more parts, and no step more items, than there is room for.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from nanovllm.engine.scheduler_output import SchedulerOutput, SharedPrefix
from nanovllm.kernels.cascade import (
    ITEM_FIELDS,
    ROWS,
    TILE,
    CascadeInputs,
    cascade_inputs,
    max_items,
    max_parts,
    num_words,
)
from nanovllm.kernels.triton.common.sizes import cdiv
from nanovllm.sampling.rows import upload

# Reading a request's results and starting from them takes as long as this many tiles of keys.
ITEM_COST = 1


class CascadeItems:
    """Items of one step after the other, of which many share what the one before did.

    num_kv_heads: of this rank. group: query heads that share one of them. num_programs: that run at the same time.
    """

    def __init__(self, num_kv_heads: int, group: int, num_programs: int) -> None:
        self._sizes = num_kv_heads, group, num_programs
        self._prefixes: Sequence[SharedPrefix] = ()
        self._words = np.zeros(0, dtype=np.int32)

    def upload(self, plan: SchedulerOutput, device: torch.device) -> CascadeInputs | None:
        """The items of a plan, if it has shared prefixes."""
        if not plan.shared_prefixes:
            return None
        return cascade_inputs(upload(self.words(plan.shared_prefixes, plan.num_decodes), device), plan.num_decodes)

    def words(self, prefixes: Sequence[SharedPrefix], num_reqs: int) -> np.ndarray:
        """As `cut`; not to be written to."""
        if len(self._words) != num_words(num_reqs) or self._prefixes != prefixes:
            self._prefixes, self._words = prefixes, cut(prefixes, num_reqs, *self._sizes)
        return self._words


def cut(
    prefixes: Sequence[SharedPrefix],
    num_reqs: int,
    num_kv_heads: int,
    group: int,
    num_programs: int,
) -> np.ndarray:
    """The words of `cascade_inputs` for one step, [num_words(num_reqs)] int32.

    prefixes: those of one request follow each other from token 0 on, in order. group: query heads that share a KV head.
    num_programs: that run at the same time. Parts are as short as keeps all of them busy, and no shorter.
    """
    words = np.zeros(num_words(num_reqs), dtype=np.int32)
    items: list[tuple[int, ...]] = []
    shared_lens, num_parts = words[-2 * num_reqs : -num_reqs], words[-num_reqs:]
    at_once = max(1, ROWS // group)  # requests of an item
    chunk = _tiles_of_part(prefixes, num_reqs, num_kv_heads, at_once, num_programs) * TILE
    for prefix in prefixes:
        last = prefix.first + prefix.num_reqs
        assert shared_lens[prefix.first] == prefix.begin, "a request's prefixes follow each other"
        bounds = _bounds(prefix, chunk)
        for part, (begin, end) in enumerate(pairwise(bounds), num_parts[prefix.first]):
            firsts = range(prefix.first, last, at_once)
            items.extend((first, min(at_once, last - first), begin, end, part) for first in firsts)
        shared_lens[prefix.first : last] = prefix.end
        num_parts[prefix.first : last] += len(bounds) - 1
    words[0] = len(items)
    if items:
        words[1 : 1 + len(items) * ITEM_FIELDS] = np.array(items).reshape(-1)
    return words


def _bounds(prefix: SharedPrefix, chunk: int) -> list[int]:
    """Where the parts of a prefix begin and end: even ones, of at most `chunk` tokens each."""
    num_tiles = (prefix.end - prefix.begin) // TILE
    num_parts = cdiv(prefix.end - prefix.begin, chunk)
    return [prefix.begin + i * num_tiles // num_parts * TILE for i in range(num_parts + 1)]


def _tiles_of_part(
    prefixes: Sequence[SharedPrefix], num_reqs: int, num_kv_heads: int, at_once: int, num_programs: int
) -> int:
    """The longest a part may be, in tiles: what is done soonest by programs that take one item after the other."""
    tiles = np.array([(prefix.end - prefix.begin) // TILE for prefix in prefixes])
    rows = np.array([cdiv(prefix.num_reqs, at_once) for prefix in prefixes])
    best, best_time = 0, float("inf")
    longest = int(tiles.max(initial=1))
    for parts_of_longest in range(1, min(longest, max_parts(num_reqs)) + 1):
        size = cdiv(longest, parts_of_longest)
        parts = -(-tiles // size)
        fits = (parts * rows).sum() <= max_items(num_reqs) and _most_parts(prefixes, parts) <= max_parts(num_reqs)
        if not fits and best:
            break
        waves = cdiv(int((parts * rows).sum()) * num_kv_heads, num_programs)
        time = waves * (size + ITEM_COST)
        if time < best_time:
            best, best_time = size, time
    return best


def _most_parts(prefixes: Sequence[SharedPrefix], parts: np.ndarray) -> int:
    """Of any request, whose prefixes are at most one of those that begin at 0 and the deeper ones behind it."""
    first = parts[[prefix.begin == 0 for prefix in prefixes]].max(initial=0)
    behind = parts[[prefix.begin > 0 for prefix in prefixes]].max(initial=0)
    return int(first + behind)
