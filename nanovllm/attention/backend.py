"""AttentionBackend: how attention is computed; ForwardContext: what a forward pass needs besides its inputs.

Owns the two interfaces only. Invariant: a model keeps no state of a step; everything that changes from step to step
arrives in the context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, HeadInputs, LayerCache


class AttentionBackend(Protocol):
    """Backends name this class as their base, for what it does by default."""

    def prepare(self, meta: AttentionMetadata) -> Any:
        """Called once a step; what it returns is handed to every layer's `forward`."""
        ...

    def forward(
        self, shape: AttentionShape, q: Tensor, cache: LayerCache, prepared: Any, sinks: Tensor | None = None
    ) -> Tensor:
        """q [num_tokens, num_heads, head_dim] -> the same shape; this step's keys and values are in the cache.

        sinks: see `kernels.paged_attention`.
        """
        ...

    def forward_qkv(
        self, shape: AttentionShape, qkv: Tensor, heads: HeadInputs, cache: LayerCache, prepared: Any,
        sinks: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """`kernels.qkv_rope_store`, then `forward`, in one; None, and nothing done, where the two are apart."""
        return None

    def num_cascade_programs(self, cache: LayerCache) -> int:
        """How many items of a cascade are computed at the same time; 0 where shared prefixes are read by each."""
        return 0


class GroupInputs(NamedTuple):
    """A step, for the layers that share a block table. prepared: what the backend made of its metadata."""

    prepared: Any
    slot_mapping: Tensor  # [num_tokens]


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """kv_caches, group_of_layer: by layer. rope_lens: see `layers/rope_scaling.py`."""

    kv_caches: Sequence[LayerCache]
    backend: AttentionBackend
    groups: Sequence[GroupInputs]
    group_of_layer: Sequence[int]
    rope_lens: Tensor | None = None  # [num_tokens]
