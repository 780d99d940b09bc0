"""TritonLatentBackend: this project's own GPU kernels for attention over latents (MLA; DeepSeek-AI, 2024).

Owns the step's plans while its layers run; `kernels/triton/attention/latent_attention.py` makes and reads them.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanovllm.attention.latent import LatentBackend, LatentStep
from nanovllm.attention.triton_paged import PreparedStep, TritonBackend
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.latent_attention import LatentPlans, latent_attention_triton
from nanovllm.kernels.triton.attention.latent_whole import attend_whole, plan_whole


@dataclass(frozen=True)
class PreparedLatentStep(PreparedStep, LatentStep):
    latent_plans: LatentPlans = field(default_factory=LatentPlans)


class TritonLatentBackend(TritonBackend, LatentBackend):
    """is_exact: for `deterministic=True`. Layers of another kind are TritonBackend's."""

    def __init__(self, is_exact: bool = False) -> None:
        self._is_exact = is_exact

    def prepare(self, meta: AttentionMetadata) -> PreparedLatentStep:
        return PreparedLatentStep(meta)

    def forward(
        self, shape: AttentionShape, q: Tensor, cache: LayerCache, prepared: PreparedStep, sinks: Tensor | None = None
    ) -> Tensor:
        if shape.value_dim is None or not isinstance(prepared, PreparedLatentStep):
            return super().forward(shape, q, cache, prepared, sinks)
        meta = prepared.meta if self.whole_from(prepared) is None else prepared.decodes
        return latent_attention_triton(q, cache, meta, shape, prepared.latent_plans, self._is_exact)

    def whole_from(self, prepared: PreparedLatentStep) -> int | None:
        return None if self._is_exact or torch.cuda.is_current_stream_capturing() else prepared.whole_from

    def forward_whole(
        self, q: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, scale: float, prepared: PreparedLatentStep
    ) -> Tensor:
        plans = prepared.latent_plans
        if plans.whole is None:
            plans.whole = plan_whole(prepared.meta, q)
        return attend_whole(q, q_rope, kv, k_rope, scale, prepared.meta, plans.whole)

    def num_cascade_programs(self, cache: LayerCache) -> int:
        return 0
