"""Shared prefixes: which decodes of a step have the same KV blocks at the beginning of their contexts.

Owns the search; `kernels/cascade.py` says what they are good for. Invariant: requests that share stand beside each
other, so what a run of them shares is the least that two neighbours in it do.
"""

from collections.abc import Sequence
from itertools import pairwise

from nanovllm.engine.scheduler_output import SharedPrefix

# Reading that many tokens fewer in a step takes about as long as the kernel that reads what is shared.
MIN_TOKENS_SAVED = 4096
# Neighbours that share less than this part of what either shares with its other neighbour belong to different runs.
SAME_RUN = 0.75


class SharedPrefixes:
    """The search of one engine. unit: tokens, a multiple of block_size at which prefixes begin and end."""

    def __init__(self, unit: int, block_size: int, min_tokens_saved: int = MIN_TOKENS_SAVED) -> None:
        self._unit, self._block_size = unit // block_size, block_size
        self._min_tokens_saved = min_tokens_saved

    def find(self, tables: Sequence[Sequence[int]], num_shared: int) -> list[SharedPrefix]:
        """`find_shared_prefixes` of these block tables. num_shared: references to blocks that others have as well."""
        if num_shared * self._block_size < self._min_tokens_saved:
            return []
        return find_shared_prefixes(tables, self._unit, self._block_size, self._min_tokens_saved)


def find_shared_prefixes(
    tables: Sequence[Sequence[int]], unit: int, block_size: int, min_tokens_saved: int
) -> list[SharedPrefix]:
    """Two levels of them at most: a system prompt, and the documents behind it; [] where too little would be saved.

    tables: each decode's KV blocks, in context order. unit: blocks; prefixes begin and end at a multiple of it.
    """
    common = [0, *(_num_common(a, b) // unit for a, b in pairwise(tables)), 0]  # with the one before
    if sum(common) * unit * block_size < min_tokens_saved:
        return []
    deepest = [max(pair) for pair in pairwise(common)]  # what each shares with either neighbour
    inner = [0, *(i for i in range(1, len(tables)) if common[i] < SAME_RUN * max(deepest[i - 1], deepest[i]))]
    outer = [0, *(i for i in inner if i and not common[i])]  # where nothing at all is shared
    size = unit * block_size
    prefixes = []
    for first, stop in pairwise([*outer, len(tables)]):
        runs = [i for i in inner if first <= i < stop]
        shared = min(common[first + 1 : stop], default=0) if len(runs) > 1 else 0
        if shared:
            prefixes.append(SharedPrefix(first, stop - first, 0, shared * size))
        for begin, end in pairwise([*runs, stop]):
            depth = min(common[begin + 1 : end], default=0)
            if depth > shared:
                prefixes.append(SharedPrefix(begin, end - begin, shared * size, depth * size))
    return prefixes


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the prefix that two block tables have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
