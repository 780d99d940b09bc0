"""TritonLatentBackend: this project's own GPU kernels for attention over latents (MLA; DeepSeek-AI, 2024).

Owns the step's plans while its layers run; `kernels/triton/attention/latent_attention.py` makes and reads them.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from nanovllm.attention.latent import LatentBackend
from nanovllm.attention.triton_paged import PreparedStep, TritonBackend
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, LayerCache
from nanovllm.kernels.triton.attention.latent_attention import LatentPlans, latent_attention_triton
from nanovllm.kernels.triton.attention.latent_whole import attend_whole, plan_whole


@dataclass(frozen=True)
class PreparedLatentStep(PreparedStep):
    latent_plans: LatentPlans = field(default_factory=LatentPlans)

    @cached_property
    def has_whole_prompts(self) -> bool:
        """Do all requests that do not decode begin in this step? A captured step may be replayed with others."""
        first = self.meta.num_decodes
        begins = self.meta.query_lens_host[first:] == self.meta.seq_lens_host[first:]
        return begins and self.meta.num_reqs > first and not torch.cuda.is_current_stream_capturing()

    @cached_property
    def decodes(self) -> AttentionMetadata:
        num = self.meta.num_decodes
        return replace(self.meta, num_reqs=num, query_lens_host=[1] * num, seq_lens_host=self.meta.seq_lens_host[:num])


class TritonLatentBackend(TritonBackend, LatentBackend):
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
        meta = prepared.meta if self.whole_from(prepared) is None else prepared.decodes
        return latent_attention_triton(q, cache, meta, shape, prepared.latent_plans, self._is_exact)

    def whole_from(self, prepared: PreparedStep) -> int | None:
        if self._is_exact or not isinstance(prepared, PreparedLatentStep) or not prepared.has_whole_prompts:
            return None
        return prepared.meta.num_decodes

    def forward_whole(
        self, q: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, scale: float, prepared: PreparedLatentStep
    ) -> Tensor:
        plans = prepared.latent_plans
        if plans.whole is None:
            plans.whole = plan_whole(prepared.meta, q)
        return attend_whole(q, q_rope, kv, k_rope, scale, prepared.meta, plans.whole)

    def num_cascade_programs(self, cache: LayerCache) -> int:
        return 0
