"""LatentBackend: what a backend of latent attention may do beside `forward`.

Owns the interface only. Invariant: a model that asks for nothing of it is right.
"""

from typing import Any

from torch import Tensor

from nanovllm.attention.backend import AttentionBackend


class LatentBackend(AttentionBackend):
    def whole_from(self, prepared: Any) -> int | None:
        """The step's token from which on there are whole prompts alone, which `forward_whole` computes sooner, and then
        `forward` is for those before it; None if that is not so."""
        return None

    def forward_whole(
        self, q: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, scale: float, prepared: Any
    ) -> Tensor:
        """With keys and values that were made for each head: see `kernels/triton/attention/latent_whole.py`."""
        raise NotImplementedError
