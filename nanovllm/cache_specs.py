"""What each layer of a model keeps of a request, and which layers share a block table.

Owns the arithmetic only: `engine/cache_manager.py` hands blocks out by it, `runner/kv_cache.py` lays tensors out by it.
Invariant: all groups have equally many places for layers, so a block means as many bytes in any of them, and one pool
serves all.

        Gemma 3 with 26 layers     group 0      the 4 layers that see everything
                                   groups 1..6  4 of the 22 layers with a window each, the last one with 2 places unused

A long context then holds blocks for all its tokens in the first group, and for the last `window` of them in the others.

Layers may differ in how many numbers they keep of a token, as Gemma 4's do: then a place is as wide as the greatest
common divisor of these, and a layer takes several. A layer may also read what another one keeps, and keep nothing.

A layer may keep a state instead, one for a request however long it is. Such layers belong to no group; a window of 0
stands for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

MAX_GROUPS = 12  # each has tables of its own to extend and to upload
SNAPSHOT_SHARE = 3  # bytes of blocks for each byte of snapshots
MIN_SNAPSHOTS = 8


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


class LatentShape(NamedTuple):
    """Sizes of multi-head latent attention (DeepSeek-V2, 2024). A token's cache holds a latent of `rank` numbers, from
    which each head's key of nope_dim and value of value_dim numbers would be made, and rope_dim numbers more of the
    key, which carry the position and are the same for all heads.

    query_rank: of the latent that queries are made from; None where they are made from the hidden state.
    """

    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int | None = None


class StateShape(NamedTuple):
    """What a layer with a state keeps of a request, in float32: the last inputs of a causal convolution, and matrices.

    conv_width: how many inputs make one output, so one more than are kept. num_heads: of matrices key_dim x value_dim.
    """

    conv_channels: int
    conv_width: int
    num_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0

    @property
    def num_floats(self) -> int:
        return self.conv_channels * (self.conv_width - 1) + self.num_heads * self.key_dim * self.value_dim

    @property
    def num_key_heads(self) -> int:
        """Heads of the two vectors that are convolved beside the values; consecutive heads of matrices share one."""
        return (self.conv_channels - self.num_heads * self.value_dim) // (2 * self.key_dim) if self.key_dim else 0

    def part(self, num_ranks: int) -> "StateShape":
        """Of one of so many ranks; what all heads share, each of them holds."""
        shared = 2 * self.key_dim if self.num_key_heads == 1 else 0
        return self._replace(
            conv_channels=(self.conv_channels - shared) // num_ranks + shared, num_heads=self.num_heads // num_ranks
        )


class StateMemory(NamedTuple):
    """Bytes of the whole model, on all ranks together: of a request's states, and of a block of keys and values.

    Snapshots get a part of the memory that is there for the cache, so that whoever knows the number of blocks knows
    theirs.
    """

    bytes_per_state: int
    bytes_per_block: int

    def num_snapshots(self, num_blocks: int) -> int:
        share = num_blocks * self.bytes_per_block // (SNAPSHOT_SHARE * self.bytes_per_state)
        return max(MIN_SNAPSHOTS, min(share, num_blocks))

    def slots(self, num_rows: int, num_blocks: int) -> range:
        """Of snapshots; those before them are the rows' own."""
        return range(num_rows, num_rows + self.num_snapshots(num_blocks))


@dataclass(frozen=True)
class CacheGroups:
    """specs: what the layers of each group keep; layers: which layers these are, by their index; state_layers: those
    that keep a state. widths: by layer, the places that it takes; empty where each takes one. sources: by layer, the
    one whose keys and values it reads; empty where each keeps its own.
    """

    specs: tuple[PagedKV, ...]
    layers: tuple[tuple[int, ...], ...]
    state_layers: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    sources: tuple[int, ...] = ()

    @property
    def keep_everything(self) -> bool:
        """All layers that keep keys and values keep those of all tokens, in one group."""
        return self.specs == (PagedKV(),)

    @property
    def num_layers(self) -> int:
        return len(self.sources) or sum(map(len, self.layers)) + len(self.state_layers)

    def source(self, layer: int) -> int:
        return self.sources[layer] if self.sources else layer

    @property
    def num_tables(self) -> int:
        """Tables of a row: the last one says where states are to be kept, if there are any."""
        return len(self.specs) + bool(self.state_layers)

    @property
    def num_places(self) -> int:
        """Layers that a block holds keys and values for; wide ones count as several."""
        return max(map(self._num_places, self.layers))

    @property
    def num_places_used(self) -> int:
        """By all layers together."""
        return sum(map(self._num_places, self.layers))

    def _num_places(self, layers: Sequence[int]) -> int:
        return sum(self.widths[layer] for layer in layers) if self.widths else len(layers)

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


def group_layers(
    windows: Sequence[int | None], max_model_len: int, row_sizes: Sequence[int] = (), sources: Sequence[int] = ()
) -> CacheGroups:
    """Groups for layers with these windows (None: sees everything); a window that nothing can leave is none, and one of
    0 is that of a layer with a state. row_sizes: numbers that each layer keeps of a token, where they differ. sources:
    as in CacheGroups.
    """
    unit = gcd(*row_sizes)
    widths = [size // unit for size in row_sizes] if len(set(row_sizes)) > 1 else [1] * len(windows)
    kinds: dict[tuple[PagedKV, int], list[int]] = {}
    for layer, window in enumerate(windows):
        if window == 0 or (sources and sources[layer] != layer):
            continue
        spec = PagedKV(None if window is None or window >= max_model_len else window)
        kinds.setdefault((spec, widths[layer]), []).append(layer)
    ordered = sorted(kinds.items(), key=lambda kind: kind[0][0].window is not None)  # stable

    def cost(num_places: int) -> tuple[int, int, int]:
        """Places unused in the groups that grow with the context, then in all; larger groups before smaller ones."""
        unused = [
            (num_groups(layers, width, num_places) * num_places - len(layers) * width, spec.window is None)
            for (spec, width), layers in ordered
        ]
        return sum(count for count, grows in unused if grows), sum(count for count, _ in unused), -num_places

    def num_groups(layers: list[int], width: int, num_places: int) -> int:
        return -(-len(layers) // (num_places // width))

    widest = max(width for (_, width), _ in ordered)
    sizes = range(widest, max(width * len(layers) for (_, width), layers in ordered) + 1)
    counts = {size: sum(num_groups(layers, width, size) for (_, width), layers in ordered) for size in sizes}
    few = [size for size in sizes if counts[size] <= MAX_GROUPS]
    size = min(few or [sizes[-1]], key=cost)
    parts = [
        (spec, tuple(layers[i : i + size // width]))
        for (spec, width), layers in ordered
        for i in range(0, len(layers), size // width)
    ]
    return CacheGroups(
        tuple(spec for spec, _ in parts),
        tuple(layers for _, layers in parts),
        tuple(layer for layer, window in enumerate(windows) if window == 0),
        tuple(widths) if max(widths) > 1 else (),
        tuple(sources),
    )
