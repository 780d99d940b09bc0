"""TritonLatentBackend: this project's own GPU kernels for attention over latents (MLA; DeepSeek-AI, 2024).

Owns the step's plans while its layers run; `kernels/triton/attention/latent_attention.py` makes and reads them.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanovllm.attention.latent import LatentBackend, LatentStep
from nanovllm.attention.triton_paged import PreparedStep, TritonBackend
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.triton.attention.latent_attention import LatentPlans, decode_plan, latent_attention_triton
from nanovllm.kernels.triton.attention.latent_few import MAX_ROWS, attend_few, query_few
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
        return latent_attention_triton(q, cache, self._meta(prepared), shape, prepared.latent_plans, self._is_exact)

    def _meta(self, prepared: PreparedLatentStep) -> AttentionMetadata:
        """Of what `forward` is for."""
        return prepared.meta if self.whole_from(prepared) is None else prepared.decodes

    def forward_few(
        self, shape: AttentionShape, q: Tensor, q_rope: Tensor, kv: Tensor, heads: HeadInputs, matrix: Tensor,
        is_neox_style: bool, cache: LayerCache, prepared: PreparedLatentStep,
    ) -> Tensor | None:  # fmt: skip
        meta = self._meta(prepared)
        if self._is_exact or not len(q) == meta.num_reqs == meta.num_decodes <= MAX_ROWS:
            return None
        queries = query_few(q, q_rope, kv, heads, matrix, cache, is_neox_style)
        plan, is_settled = decode_plan(prepared.latent_plans, meta, queries[..., : matrix.shape[2]], cache)
        return attend_few(queries, matrix, cache, meta, shape, plan, q.shape[2], is_settled)

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
