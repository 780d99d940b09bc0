"""Attention: from the QKV projection's output to the attention output, through the KV cache of its layer.

Owns no weight and no cache: the norm weights come from the model, the cache from the context.
"""

from torch import Tensor

from nanovllm.attention.backend import ForwardContext
from nanovllm.kernels.ops import Ops
from nanovllm.kernels.qkv_rope_store import HeadInputs
from nanovllm.layers.norm import RMSNorm


class Attention:
    """Grouped-query attention of one layer (Ainslie et al., 2023), for the heads of this rank."""

    def __init__(
        self,
        layer_idx: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        ops: Ops,
    ) -> None:
        self.layer_idx = layer_idx
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = scale
        self.window = window
        self.softcap = softcap
        self.ops = ops

    def __call__(
        self, qkv: Tensor, cos_sin: Tensor | None, ctx: ForwardContext, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> Tensor:
        """qkv [num_tokens, (num_heads + 2 num_kv_heads) head_dim] -> [num_tokens, num_heads * head_dim]."""
        kv_cache = ctx.kv_caches[self.layer_idx]
        heads = HeadInputs(
            cos_sin,
            ctx.slot_mapping,
            q_norm.weight if q_norm else None,
            k_norm.weight if k_norm else None,
            q_norm.eps if q_norm else 0.0,
        )
        how = self.scale, self.window, self.softcap
        out = ctx.backend.forward_qkv(self.layer_idx, qkv, heads, self.num_heads, kv_cache, ctx.prepared, *how)
        if out is None:
            q = self.ops.qkv_rope_store(
                qkv,
                cos_sin,
                kv_cache,
                ctx.slot_mapping,
                self.num_heads,
                self.num_kv_heads,
                self.head_dim,
                heads.q_norm_weight,
                heads.k_norm_weight,
                heads.eps,
            )
            out = ctx.backend.forward(self.layer_idx, q, kv_cache, ctx.prepared, *how)
        return out.flatten(1)
