"""TritonBackend: this project's own GPU kernels for attention over the paged KV cache.

Owns the step's plans while its layers run; `kernels/triton/attention/paged_attention.py` makes and reads them.
"""

from collections import defaultdict
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
    """plans: by number and size of KV heads, in which the layers of few models differ."""

    meta: AttentionMetadata
    plans: defaultdict[tuple[int, int], StepPlans] = field(default_factory=lambda: defaultdict(StepPlans))

    def plans_of(self, shape: AttentionShape) -> StepPlans:
        return self.plans[shape.num_kv_heads, shape.head_dim]


@dataclass(frozen=True)
class BatchInvariantStep:
    """plans: likewise."""

    meta: AttentionMetadata
    plans: defaultdict[tuple[int, int], StepPlan] = field(default_factory=lambda: defaultdict(StepPlan))


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
        plan = prepared.plans[shape.num_kv_heads, shape.head_dim]
        return batch_invariant_attention_triton(q, cache, prepared.meta, shape, plan, sinks)


class TritonBackend(AttentionBackend):
    def prepare(self, meta: AttentionMetadata) -> PreparedStep:
        return PreparedStep(meta)

    def forward(
        self, shape: AttentionShape, q: Tensor, cache: LayerCache, prepared: PreparedStep, sinks: Tensor | None = None
    ) -> Tensor:
        return paged_attention_triton(q, cache, prepared.meta, shape, prepared.plans_of(shape), sinks)

    def forward_qkv(
        self, shape: AttentionShape, qkv: Tensor, heads: HeadInputs, cache: LayerCache, prepared: PreparedStep,
        sinks: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """One kernel where a few requests decode and nothing else."""
        if not takes_qkv(prepared.meta, shape.window):
            return None
        return decode_qkv_triton(qkv, heads, cache, prepared.meta, shape, prepared.plans_of(shape), sinks)

    def num_cascade_programs(self, cache: LayerCache) -> int:
        return num_programs(cache)
