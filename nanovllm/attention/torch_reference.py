"""Paged attention in plain PyTorch, as a backend: slow, obviously right, on any device.

Owns nothing but the wiring; the meaning is `paged_attention_reference`. Invariant: keeps no state between calls.
"""

from torch import Tensor

from nanovllm.attention.metadata import AttentionMetadata
from nanovllm.kernels.paged_attention import paged_attention_reference


class TorchReferenceBackend:
    """What every other attention backend must equal."""

    def prepare(self, meta: AttentionMetadata) -> AttentionMetadata:
        """Nothing to compute once per step."""
        return meta

    def forward(
        self, layer_idx: int, q: Tensor, kv_cache: Tensor, prepared: AttentionMetadata, scale: float, window: int | None
    ) -> Tensor:
        """q [num_tokens, num_heads, head_dim] -> the same shape; see `kernels.paged_attention`."""
        return paged_attention_reference(q, kv_cache, prepared, scale, window)
