"""What each layer of a model keeps of a request, and which layers share a block table.

Owns the arithmetic only: `engine/cache_manager.py` hands blocks out by it, `runner/kv_cache.py` lays tensors out by it.
Invariant: all groups have equally many places for layers, so a block means as many bytes in any of them, and one pool
serves all.

        Gemma 3 with 26 layers     group 0      the 4 layers that see everything
                                   groups 1..6  4 of the 22 layers with a window each, the last one with 2 places unused

A long context then holds blocks for all its tokens in the first group, and for the last `window` of them in the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_GROUPS = 8  # each has tables of its own to extend and to upload


@dataclass(frozen=True)
class PagedKV:
    """Keys and values in blocks: of all tokens, or of those that a query within a window still sees."""

    window: int | None = None

    def first_block(self, num_computed_tokens: int, block_size: int) -> int:
        """The first block, by its index, that the tokens after these still read."""
        return 0 if self.window is None else max(0, num_computed_tokens - self.window + 1) // block_size

    def num_blocks(self, num_tokens: int, num_step_tokens: int, block_size: int) -> int:
        """Blocks that a request of so many tokens holds at most, if a step computes no more than num_step_tokens."""
        num_blocks = -(-num_tokens // block_size)
        if self.window is None:
            return num_blocks
        return min(num_blocks, -(-(self.window + num_step_tokens - 1) // block_size) + 1)


@dataclass(frozen=True)
class CacheGroups:
    """specs: what the layers of each group keep; layers: which layers these are, by their index."""

    specs: tuple[PagedKV, ...]
    layers: tuple[tuple[int, ...], ...]

    @property
    def keep_everything(self) -> bool:
        """All layers keep all tokens, in one group."""
        return self.specs == (PagedKV(),)

    @property
    def num_places(self) -> int:
        """Layers that a block holds keys and values for."""
        return max(map(len, self.layers))

    def num_blocks(self, num_tokens: int, num_step_tokens: int, block_size: int) -> int:
        """Blocks that one request of so many tokens holds at most, in all groups together."""
        return sum(spec.num_blocks(num_tokens, num_step_tokens, block_size) for spec in self.specs)

    def num_tokens_in(self, num_blocks: int, block_size: int, max_model_len: int, num_step_tokens: int) -> int:
        """What so many blocks hold, in requests of max_model_len tokens."""
        if self.keep_everything:
            return num_blocks * block_size
        return num_blocks * max_model_len // self.num_blocks(max_model_len, num_step_tokens, block_size)

    def longest_request(self, num_blocks: int, block_size: int, max_model_len: int, num_step_tokens: int) -> int:
        """Tokens of the longest request that so many blocks hold, at most max_model_len."""
        low, high = 0, max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            if self.num_blocks(middle, num_step_tokens, block_size) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return low


def group_layers(windows: Sequence[int | None], max_model_len: int) -> CacheGroups:
    """Groups for layers with these windows (None: sees everything); a window that nothing can leave is none."""
    kinds: dict[PagedKV, list[int]] = {}
    for layer, window in enumerate(windows):
        kinds.setdefault(PagedKV(None if window is None or window >= max_model_len else window), []).append(layer)
    ordered = sorted(kinds.items(), key=lambda kind: kind[0].window is not None)  # stable

    def cost(num_places: int) -> tuple[int, int, int]:
        """Places unused in the groups that grow with the context, then in all; larger groups before smaller ones."""
        unused = [(-len(layers) % num_places, spec.window is None) for spec, layers in ordered]
        return sum(count for count, grows in unused if grows), sum(count for count, _ in unused), -num_places

    sizes = range(1, max(len(layers) for _, layers in ordered) + 1)
    few = [size for size in sizes if sum(-(-len(layers) // size) for _, layers in ordered) <= MAX_GROUPS]
    size = min(few or [sizes[-1]], key=cost)
    parts = [(spec, tuple(layers[i : i + size])) for spec, layers in ordered for i in range(0, len(layers), size)]
    return CacheGroups(tuple(spec for spec, _ in parts), tuple(layers for _, layers in parts))
