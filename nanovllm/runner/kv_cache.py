"""The KV cache's tensors: how many blocks fit into a budget of bytes, and their layout.

Owns both. Invariant: every layer's cache holds [2, num_blocks, num_kv_heads, block_size, head_dim] (keys, values; or
keys alone, which hold the values): the tokens of a block lie side by side under each head, so that a head reads a block
in one piece. It is contiguous, but where layers differ in their heads: there, what a block holds of all layers of a
group lies together, and a layer's cache has strides. A cache of codes has as many scales beside it, contiguous always.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from nanovllm.cache_specs import CacheGroups, StateMemory
from nanovllm.config import ResolvedConfig
from nanovllm.kernels.attention_types import LayerCache
from nanovllm.kernels.cache_codes import LARGEST, row_bytes

MakeZeros = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy leaves the zeroing to the operating system, page by page on first use; torch.zeros writes all of it at once,
    # which takes seconds and memory that most runs never need.
    return torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True, kw_only=True)
class KVCacheSpec:
    """What one device's cache holds per layer, and how layers share blocks.

    states: of the whole model, where some layers keep one; num_ranks: that share it. bytes_beside: what another
    model keeps for each block, in a cache of its own. num_planes: keys and values; or keys alone, which hold them.
    layer_heads: by layer, KV heads of this rank and their size, where layers differ.
    """

    groups: CacheGroups
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    states: StateMemory | None = None
    num_ranks: int = 1
    bytes_beside: int = 0
    num_planes: int = 2
    layer_heads: tuple[tuple[int, int], ...] = ()

    @property
    def bytes_per_block(self) -> int:
        if self.layer_heads:
            num_scales = self.num_planes * self.block_size * sum(heads for heads, _ in {*self._scale_places.values()})
            scale_bytes = num_scales * torch.bfloat16.itemsize if self.dtype in LARGEST else 0
            return self._numbers_per_block * self.dtype.itemsize + scale_bytes + self.bytes_beside
        num_rows = self.num_planes * self.groups.num_places * self.num_kv_heads * self.block_size
        return num_rows * row_bytes(self.head_dim, self.dtype, self.num_planes) + self.bytes_beside

    @property
    def _numbers_per_block(self) -> int:
        return max(sum(prod(self._shape_in_block(layer)) for layer in layers) for layers in self.groups.layers)

    def _shape_in_block(self, layer: int) -> tuple[int, int, int, int]:
        num_kv_heads, head_dim = self.layer_heads[layer]
        return self.num_planes, num_kv_heads, self.block_size, head_dim

    @property
    def _scale_places(self) -> dict[int, tuple[int, int]]:
        """Where layers differ, by layer: its KV heads, and which of its group's layers with as many it is. Layers of
        the same place share a tensor of scales, as a block is of one group at a time."""
        places = {}
        for layers in self.groups.layers:
            num_with: Counter[int] = Counter()
            for layer in layers:
                num_kv_heads, _ = self.layer_heads[layer]
                places[layer] = num_kv_heads, num_with[num_kv_heads]
                num_with[num_kv_heads] += 1
        return places

    def num_blocks_in(self, num_bytes: int) -> int:
        """Beside their snapshots, if layers keep states."""
        num_blocks = num_bytes // self.bytes_per_block
        while self.states is not None and num_blocks > 0 and self._num_bytes(num_blocks, self.states) > num_bytes:
            num_blocks -= 1 + num_blocks // 256
        return max(num_blocks, 0)

    def _num_bytes(self, num_blocks: int, states: StateMemory) -> int:
        snapshots = states.num_snapshots(num_blocks) * states.bytes_per_state // self.num_ranks
        return num_blocks * self.bytes_per_block + snapshots

    def allocate(self, num_blocks: int, device: torch.device, make: MakeZeros = zeros) -> list[LayerCache]:
        """By layer, zeroed: kernels may read a whole block of which only a part was written.

        A block is of one group at a time, so layers that have the same place in their groups have one tensor. Layers
        with a state read none of them; one stands there in their place. make: the tensors.
        """
        if self.layer_heads:
            return self._allocate_together(num_blocks, device, make)
        shape = (self.num_planes, num_blocks, self.num_kv_heads, self.block_size, self.head_dim)
        places = [LayerCache(make(shape, self.dtype, device)) for _ in range(self.groups.num_places)]
        if self.dtype in LARGEST:
            pairs = (*shape[1:4], 2)
            places = [LayerCache(place.data, make(pairs, torch.bfloat16, device)) for place in places]
        by_layer = {layer: places[i] for layers in self.groups.layers for i, layer in enumerate(layers)}
        return [by_layer.get(self.groups.source(layer), places[0]) for layer in range(self.groups.num_layers)]

    def _allocate_together(self, num_blocks: int, device: torch.device, make: MakeZeros) -> list[LayerCache]:
        pool, by_layer = make((num_blocks, self._numbers_per_block), self.dtype, device), {}
        places, scales = self._scale_places, {}
        if self.dtype in LARGEST:
            for place in {*places.values()}:
                scales[place] = make((num_blocks, place[0], self.block_size, 2), torch.bfloat16, device)
        for layers in self.groups.layers:
            first = 0
            for layer in layers:
                shape = self._shape_in_block(layer)
                numbers = pool[:, first : first + prod(shape)].unflatten(1, shape)
                by_layer[layer] = LayerCache(numbers.transpose(0, 1), scales.get(places[layer]))
                first += prod(shape)
        return [by_layer[self.groups.source(layer)] for layer in range(self.groups.num_layers)]


def choose_num_blocks(config: ResolvedConfig, spec: KVCacheSpec, free_bytes: int) -> int:
    """Blocks to allocate. free_bytes: what is left of the memory the engine may use once weights and work space are in.

    config is resolved. Raises ValueError if not even one block of the budget fits.
    """
    if config.num_gpu_blocks_override is not None:  # blocks for all layers
        return config.num_gpu_blocks_override * len(spec.groups.specs)
    num_bytes = config.kv_cache_memory_bytes if config.kv_cache_memory_bytes is not None else free_bytes
    num_blocks = spec.num_blocks_in(max(num_bytes, 0))
    if num_blocks < 1:
        raise ValueError(
            f"the KV cache needs {spec.bytes_per_block:,} bytes for one block of {spec.block_size} tokens and "
            f"{num_bytes:,} are available; raise kv_cache_memory_bytes or gpu_memory_utilization, or take a smaller "
            "model"
        )
    return num_blocks


def useful_num_blocks(config: ResolvedConfig, groups: CacheGroups) -> int:
    """Blocks that max_num_seqs requests of max_model_len can hold; more would only serve the prefix cache.

    What they hold of a window's group at one time is less, and the rest of these blocks is for the prefix cache.
    """
    return -(-config.max_model_len // config.block_size) * config.max_num_seqs * len(groups.specs)
