"""Ministral 3: queries grow with their position, so that attention stays sharp in long contexts, as in Llama 4.

Owns the scale of a position, 1 + beta log(1 + floor(position / original length)). Invariant: it is 1 within the length
that the model was first trained for.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovllm.attention.backend import ForwardContext
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.model_config import ModelConfig
from nanovllm.models.llama import LlamaForCausalLM, SelfAttention


@dataclass(frozen=True, kw_only=True)
class ScaledContext(ForwardContext):
    query_scales: Tensor  # [num_tokens, 1] in the model's dtype


class ScaledQueries(SelfAttention):
    def forward(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(ctx, ScaledContext)
        qkv, residual = self.qkv_proj.after_norm(norm, x, residual)
        qkv[:, : self.parts[0]].mul_(ctx.query_scales)  # a factor passes through the rotation
        return self.o_proj(self.attention(qkv, cos_sin, ctx, None, None)), residual


class Ministral3ForCausalLM(LlamaForCausalLM):
    def __init__(self, config: ModelConfig, max_len: int, dtype: torch.dtype, *others: Any) -> None:
        super().__init__(config, max_len, dtype, *others, attention=ScaledQueries)
        parameters = config.extra["rope_scaling"] or config.extra["rope_parameters"]
        self.original_length = parameters["original_max_position_embeddings"]
        lengths = torch.arange(max_len // self.original_length + 1, dtype=torch.float32, device="cpu")
        scales = 1 + parameters["llama_4_scaling_beta"] * torch.log1p(lengths)
        self.scales: Tensor  # by how many original lengths are behind; [num_lengths, 1]
        self.register_buffer("scales", scales[:, None].to(torch.get_default_device(), dtype), persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        scales = self.scales[positions // self.original_length]
        return super().forward(input_ids, positions, ScaledContext(**vars(ctx), query_scales=scales))
