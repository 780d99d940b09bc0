"""TritonBackend: this project's own GPU kernels for attention over the paged KV cache.

Owns the step's plans while its layers run; `kernels/paged_attention_triton.py` makes and reads them.
"""

from dataclasses import dataclass, field

from torch import Tensor

from nanovllm.attention.backend import AttentionBackend
from nanovllm.attention.metadata import AttentionMetadata
from nanovllm.kernels.paged_attention_triton import StepPlans, decode_qkv_triton, paged_attention_triton, takes_qkv
from nanovllm.kernels.qkv_rope_store import HeadInputs


@dataclass(frozen=True)
class PreparedStep:
    meta: AttentionMetadata
    plans: StepPlans = field(default_factory=StepPlans)


class TritonBackend(AttentionBackend):
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
        return paged_attention_triton(q, kv_cache, prepared.meta, scale, window, softcap, prepared.plans)

    def forward_qkv(
        self,
        layer_idx: int,
        qkv: Tensor,
        heads: HeadInputs,
        num_heads: int,
        kv_cache: Tensor,
        prepared: PreparedStep,
        scale: float,
        window: int | None,
        softcap: float | None = None,
    ) -> Tensor | None:
        """One kernel where all requests decode."""
        if not takes_qkv(prepared.meta, window):
            return None
        return decode_qkv_triton(qkv, heads, num_heads, kv_cache, prepared.meta, scale, window, softcap, prepared.plans)
