"""TritonBackend: this project's own GPU kernels for attention over the paged KV cache.

Owns the step's plans while its layers run; `kernels/triton/attention/paged_attention.py` makes and reads them.
"""

from dataclasses import dataclass, field

from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.kernels.attention_types import AttentionMetadata, AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.triton.attention.cascade import num_programs
from nanovllm.kernels.triton.attention.paged_attention import (
    StepPlans,
    decode_qkv_triton,
    paged_attention_triton,
    takes_qkv,
)
from nanovllm.kernels.triton.batch_invariant.attention import StepPlan, batch_invariant_attention_triton


@dataclass(frozen=True)
class PreparedStep:
    meta: AttentionMetadata
    plans: StepPlans = field(default_factory=StepPlans)


@dataclass(frozen=True)
class BatchInvariantStep:
    meta: AttentionMetadata
    plan: StepPlan = field(default_factory=StepPlan)


class BatchInvariantTritonBackend(AttentionBackend):
    """For `deterministic=True`."""

    def prepare(self, meta: AttentionMetadata) -> BatchInvariantStep:
        return BatchInvariantStep(meta)

    def forward(
        self,
        shape: AttentionShape,
        q: Tensor,
        cache: LayerCache,
        prepared: BatchInvariantStep,
        sinks: Tensor | None = None,
    ) -> Tensor:
        return batch_invariant_attention_triton(q, cache, prepared.meta, shape, prepared.plan, sinks)


class TritonBackend(AttentionBackend):
    def prepare(self, meta: AttentionMetadata) -> PreparedStep:
        return PreparedStep(meta)

    def forward(
        self, shape: AttentionShape, q: Tensor, cache: LayerCache, prepared: PreparedStep, sinks: Tensor | None = None
    ) -> Tensor:
        return paged_attention_triton(q, cache, prepared.meta, shape, prepared.plans, sinks)

    def forward_qkv(
        self, shape: AttentionShape, qkv: Tensor, heads: HeadInputs, cache: LayerCache, prepared: PreparedStep,
        sinks: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """One kernel where a few requests decode and nothing else."""
        if not takes_qkv(prepared.meta, shape.window):
            return None
        return decode_qkv_triton(qkv, heads, cache, prepared.meta, shape, prepared.plans, sinks)

    def num_cascade_programs(self, cache: LayerCache) -> int:
        return num_programs(cache)
