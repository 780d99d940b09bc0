"""Attention: from the QKV projection's output to the attention output, through the KV cache of its layer.

Owns no weight and no cache: the norm weights come from the model, the cache from the context.
"""

from torch import Tensor

from nanovllm.attention.backend import ForwardContext
from nanovllm.kernels.attention_types import AttentionShape, HeadInputs
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.ops import Ops


class Attention:
    """Grouped-query attention of one layer (Ainslie et al., 2023), for the heads of this rank."""

    def __init__(self, layer_idx: int, shape: AttentionShape, ops: Ops) -> None:
        self.layer_idx = layer_idx
        self.shape = shape
        self.ops = ops
        self.sinks: Tensor | None = None  # set by the families that have some

    def __call__(
        self, qkv: Tensor, cos_sin: Tensor | None, ctx: ForwardContext, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> Tensor:
        """qkv [num_tokens, (num_heads + 2 num_kv_heads) head_dim] -> [num_tokens, num_heads * head_dim]."""
        cache = ctx.kv_caches[self.layer_idx]
        prepared, slot_mapping = ctx.groups[ctx.group_of_layer[self.layer_idx]]
        heads = HeadInputs(cos_sin, slot_mapping)
        if q_norm is not None and k_norm is not None:
            heads = HeadInputs(cos_sin, slot_mapping, q_norm.weight, k_norm.weight, q_norm.eps)
        out = ctx.backend.forward_qkv(self.shape, qkv, heads, cache, prepared, self.sinks)
        if out is None:
            q = self.ops.qkv_rope_store(qkv, heads, cache, self.shape)
            out = ctx.backend.forward(self.shape, q, cache, prepared, self.sinks)
        return out.flatten(1)
