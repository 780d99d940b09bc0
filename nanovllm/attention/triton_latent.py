"""TritonLatentBackend: this project's own GPU kernels for attention over latents (MLA; DeepSeek-AI, 2024).

Owns the step's plans while its layers run; `kernels/triton/attention/latent_attention.py` makes and reads them.
"""

from dataclasses import dataclass, field

from torch import Tensor

from nanovllm.attention.triton_paged import PreparedStep, TritonBackend
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.latent_attention import LatentPlans, latent_attention_triton


@dataclass(frozen=True)
class PreparedLatentStep(PreparedStep):
    latent_plans: LatentPlans = field(default_factory=LatentPlans)


class TritonLatentBackend(TritonBackend):
    """is_exact: for `deterministic=True`. Layers of another kind, of a model that drafts, are TritonBackend's."""

    def __init__(self, is_exact: bool = False) -> None:
        self._is_exact = is_exact

    def prepare(self, meta: AttentionMetadata) -> PreparedLatentStep:
        return PreparedLatentStep(meta)

    def forward(
        self, shape: AttentionShape, q: Tensor, cache: LayerCache, prepared: PreparedStep, sinks: Tensor | None = None
    ) -> Tensor:
        if shape.value_dim is None or not isinstance(prepared, PreparedLatentStep):
            return super().forward(shape, q, cache, prepared, sinks)
        return latent_attention_triton(q, cache, prepared.meta, shape, prepared.latent_plans, self._is_exact)

    def num_cascade_programs(self, cache: LayerCache) -> int:
        return 0
