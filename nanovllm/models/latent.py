"""Multi-head latent attention (MLA): DeepSeek-V2 and V3, GLM-4.7-Flash, and the attention layers of Kimi-Linear.

Owns the block, and the names of its tensors. Invariant: called and loaded as the blocks of `llama.py`, whose decoder is
the same.

    hidden ─┬─ q_proj, or q_a_proj, norm, q_b_proj ── per head [ part that scores latents | part that is rotated ]
            └─ kv_a_proj_with_mqa ── [ latent | part that is rotated ], cached after norm and rotation: one "KV head"
    kv_b_proj would make each head's key and value of the latent; `layers/absorbed.py` has it in another place
"""

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.attention.latent import LatentBackend
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.latent_store import latent_store, stored_rows
from nanovllm.layers.absorbed import AbsorbedProjection
from nanovllm.layers.linear import LinearBase, MergedColumnParallelLinear, RowParallelLinear
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpecs
from nanovllm.model_config import ModelConfig

_EPS = 1e-6  # of the norms of latents, whatever the config says of the others


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        assert config.latent is not None
        rank, rope_dim, nope_dim, value_dim, query_rank = config.latent
        hidden, num_heads, head_dim = config.hidden_size, config.num_heads, nope_dim + rope_dim
        self.layer_idx, self.nope_dim, self.is_neox_style = layer_idx, nope_dim, config.is_neox_style
        held = len(tp.part(num_heads, "num_attention_heads"))
        queries = num_heads * head_dim
        first = tp.part(queries, "queries") if query_rank is None else range(query_rank)
        sizes = (queries if query_rank is None else query_rank, rank + rope_dim)
        spec = LinearSpec(sizes, (first, range(rank + rope_dim)), hidden, range(hidden), dtype)
        self.qkv_proj = LinearBase(spec, False, ops)  # latents are the same on every rank
        self.parts = [len(first), rank + rope_dim]
        self.q_a_norm: RMSNorm | None = None
        if query_rank is not None:
            self.q_a_norm = RMSNorm(query_rank, _EPS, dtype, ops)
            self.q_b_proj = MergedColumnParallelLinear(query_rank, [queries], False, dtype, tp, ops)
        self.kv_a_norm = RMSNorm(rank, _EPS, dtype, ops)
        self.kv_b_proj = AbsorbedProjection(rank, nope_dim, value_dim, num_heads, dtype, tp, ops)
        self.o_proj = RowParallelLinear(num_heads * value_dim, hidden, False, dtype, tp, ops)
        self.shape = AttentionShape(held, 1, rank + rope_dim, config.attention_scale, value_dim=rank)

    def forward(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        qkv, residual = self.qkv_proj.after_norm(norm, x, residual)
        q, kv = qkv.split(self.parts, dim=-1)
        if self.q_a_norm is not None:
            q, _ = self.q_b_proj.after_norm(self.q_a_norm, q.contiguous(), None)
        q, q_rope = q.unflatten(1, (self.shape.num_heads, -1)).tensor_split([self.nope_dim], dim=-1)
        return self.o_proj(self._attend(q, q_rope, kv, cos_sin, ctx)), residual

    def _attend(self, q: Tensor, q_rope: Tensor, kv: Tensor, cos_sin: Tensor | None, ctx: ForwardContext) -> Tensor:
        """[num_tokens, num_heads * value_dim]"""
        backend, (prepared, _) = ctx.backend, ctx.groups[ctx.group_of_layer[self.layer_idx]]
        first = backend.whole_from(prepared) if isinstance(backend, LatentBackend) else None
        inputs, n = (q, q_rope, kv) if cos_sin is None else (q, q_rope, kv, cos_sin), q.shape[0]
        outputs = []
        if first != 0:
            outputs.append(self._absorbed(ctx, slice(0, first), *(x[:first] for x in inputs)))
        if first is not None:
            outputs.append(self._whole(ctx, slice(first, n), *(x[first:] for x in inputs)))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _absorbed(
        self, ctx: ForwardContext, tokens: slice, q: Tensor, q_rope: Tensor, kv: Tensor, cos_sin: Tensor | None = None
    ) -> Tensor:
        """Over the cache as it is. tokens: which of the step's these are."""
        cache, rank, backend = ctx.kv_caches[self.layer_idx], self.kv_a_norm.weight.shape[0], ctx.backend
        prepared, slots = ctx.groups[ctx.group_of_layer[self.layer_idx]]
        if isinstance(backend, LatentBackend):
            inputs = q, q_rope, kv, self._heads(cos_sin, slots[tokens]), self.kv_b_proj.matrix, self.is_neox_style
            values = backend.forward_few(self.shape, *inputs, cache, prepared)
            if values is not None:
                return values
        queries = q.new_empty(q.shape[0], self.shape.num_heads, self.shape.head_dim)
        self.kv_b_proj.absorb(q, queries[..., :rank])
        self._store(queries[..., rank:], q_rope, kv, cos_sin, slots[tokens], cache)
        return self.kv_b_proj.values(backend.forward(self.shape, queries, cache, prepared))

    def _whole(
        self, ctx: ForwardContext, tokens: slice, q: Tensor, q_rope: Tensor, kv: Tensor, cos_sin: Tensor | None = None
    ) -> Tensor:
        """With keys and values of each head: of prompts that begin in this step. tokens: which of its these are."""
        assert isinstance(ctx.backend, LatentBackend)
        cache, rank = ctx.kv_caches[self.layer_idx], self.kv_a_norm.weight.shape[0]
        prepared, slots = ctx.groups[ctx.group_of_layer[self.layer_idx]]
        turned = torch.empty_like(q_rope)
        self._store(turned, q_rope, kv, cos_sin, slots[tokens], cache)
        rows = stored_rows(cache, slots[tokens].clamp(min=0), rank, kv.dtype)  # as what is found in the cache
        made = self.kv_b_proj.expand(rows[:, :rank])
        return ctx.backend.forward_whole(q, turned, made, rows[:, rank:], self.shape.scale, prepared).flatten(1)

    def _store(
        self, turned: Tensor, q_rope: Tensor, kv: Tensor, cos_sin: Tensor | None, slots: Tensor, cache: LayerCache
    ) -> None:
        latent_store(turned, q_rope, kv, self._heads(cos_sin, slots), cache, self.is_neox_style)

    def _heads(self, cos_sin: Tensor | None, slots: Tensor) -> HeadInputs:
        return HeadInputs(cos_sin, slots, k_norm_weight=self.kv_a_norm.weight, eps=_EPS)

    def weights(self, name: str) -> WeightSpecs:
        first = "q_proj" if self.q_a_norm is None else "q_a_proj"
        yield from self.qkv_proj.weights(f"{name}.{first}", f"{name}.kv_a_proj_with_mqa")
        if self.q_a_norm is not None:
            yield from self.q_a_norm.weights(f"{name}.q_a_layernorm")
            yield from self.q_b_proj.weights(f"{name}.q_b_proj")
        yield from self.kv_a_norm.weights(f"{name}.kv_a_layernorm")
        yield from self.kv_b_proj.weights(f"{name}.kv_b_proj")
        yield from self.o_proj.weights(f"{name}.o_proj")
