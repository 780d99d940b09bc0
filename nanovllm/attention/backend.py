"""AttentionBackend: how attention is computed; ForwardContext: what a forward pass needs besides its inputs.

Owns the two interfaces only. Invariant: a model keeps no state of a step; everything that changes from step to step
arrives in the context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from nanovllm.attention.metadata import AttentionMetadata
from nanovllm.kernels.qkv_rope_store import HeadInputs


class AttentionBackend(Protocol):
    """Backends name this class as their base, for what it does by default."""

    def prepare(self, meta: AttentionMetadata) -> Any:
        """Called once a step; what it returns is handed to every layer's `forward`."""
        ...

    def forward(
        self,
        layer_idx: int,
        q: Tensor,
        kv_cache: Tensor,
        prepared: Any,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """q [num_tokens, num_heads, head_dim] -> the same shape; this step's keys and values are in the cache.

        scale, window, softcap: as in `kernels/paged_attention.py`.
        """
        ...

    def forward_qkv(
        self,
        layer_idx: int,
        qkv: Tensor,
        heads: HeadInputs,
        num_heads: int,
        kv_cache: Tensor,
        prepared: Any,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor | None:
        """`kernels.qkv_rope_store`, then `forward`, in one; None, and nothing done, where the two are apart."""
        return None


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """kv_caches: per layer, [2, num_blocks, num_kv_heads, block_size, head_dim]. rope_lens: see `layers/rotary.py`."""

    kv_caches: Sequence[Tensor]
    backend: AttentionBackend
    prepared: Any
    slot_mapping: Tensor  # [num_tokens]
    rope_lens: Tensor | None = None  # [num_tokens]
