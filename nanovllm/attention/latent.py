"""LatentBackend: what a backend of latent attention may do beside `forward`.

Owns the interface only. Invariant: a model that asks for nothing of it is right.
"""

from typing import Any

from torch import Tensor

from nanovllm.attention.backend import AttentionBackend


class LatentBackend(AttentionBackend):
    def takes_whole(self, prepared: Any) -> bool:
        """Is the step one of whole prompts, which `forward_whole` computes sooner?"""
        return False

    def forward_whole(
        self, q: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, scale: float, prepared: Any
    ) -> Tensor:
        """With keys and values that were made for each head: see `kernels/triton/attention/latent_whole.py`."""
        raise NotImplementedError
