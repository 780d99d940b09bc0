"""TritonBackend: this project's own GPU kernels for attention over the paged KV cache.

Owns what layers share within a step: how the decodes are cut into equal pieces of work, once for each window size.
"""

from dataclasses import dataclass, field

from torch import Tensor

from nanovllm.attention.metadata import AttentionMetadata
from nanovllm.kernels.paged_attention_triton import DecodePlan, paged_attention_triton, plan_decode


@dataclass(frozen=True)
class PreparedStep:
    meta: AttentionMetadata
    plans: dict[int | None, DecodePlan] = field(default_factory=dict)  # by window


class TritonBackend:
    def prepare(self, meta: AttentionMetadata) -> PreparedStep:
        return PreparedStep(meta)

    def forward(
        self,
        layer_idx: int,
        q: Tensor,
        kv_cache: Tensor,
        prepared: PreparedStep,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor:
        """See `kernels/paged_attention.py`."""
        meta, plan = prepared.meta, prepared.plans.get(window)
        is_settled = plan is not None  # since an earlier layer
        if plan is None and meta.num_decodes:
            plan = prepared.plans[window] = plan_decode(meta.seq_lens[: meta.num_decodes], q, kv_cache, window)
        return paged_attention_triton(q, kv_cache, meta, scale, window, plan, softcap, is_settled)
