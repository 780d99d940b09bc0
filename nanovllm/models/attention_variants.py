"""Attention blocks with a little more than `llama.SelfAttention`: another order of norm and rotation, or sinks.

Owns what happens to queries and keys between the projection and the cache, and the sinks. Invariant: called and loaded
as SelfAttention; attention itself, with its cache and its kernels, is the same.
"""

import torch
from torch import Tensor

from nanovllm.attention.backend import ForwardContext
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.rope import apply_rope_reference
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpecs, part_spec, unfilled
from nanovllm.model_config import ModelConfig
from nanovllm.models.llama import SelfAttention


class NormAfterRotation(SelfAttention):
    """The norms of heads come after the rotation, so neither is left to the kernel that stores keys and values."""

    def forward(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None and self.k_norm is not None
        qkv, residual = self.qkv_proj.after_norm(norm, x, residual)
        q, k, v = (part.unflatten(1, (-1, self.attention.shape.head_dim)) for part in qkv.split(self.parts, dim=1))
        if cos_sin is not None:
            q, k = (self.attention.ops.by_row(apply_rope_reference, heads, cos_sin) for heads in (q, k))
        qkv = torch.cat((self.q_norm(q)[0], self.k_norm(k)[0], v), dim=1).flatten(1)
        return self.o_proj(self.attention(qkv, None, ctx, None, None)), residual


class SinkAttention(SelfAttention):
    """Each head may look at nothing (`kernels/paged_attention.py`)."""

    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__(config, layer_idx, dtype, tp, ops)
        self.num_heads, self.heads = config.num_heads, tp.part(config.num_heads, "num_attention_heads")
        self.sinks = unfilled(len(self.heads), dtype=torch.float32)
        self.attention.sinks = self.sinks

    def weights(self, name: str) -> WeightSpecs:
        yield from super().weights(name)
        yield part_spec(f"{name}.sinks", self.sinks, self.num_heads, self.heads)
