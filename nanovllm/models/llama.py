"""The dense decoder of Llama and of the families near it: one definition, with switches from ModelConfig.

Owns the order of operations and the names of the checkpoint's tensors. Invariant: stateless; a forward pass depends on
its arguments and the weights only.

    input_ids -> embedding -> [ (+) norm, QKV -> rotation, KV store -> attention -> O -> (+) norm, gate, up -> down ]
              -> (+) norm -> head -> logits             (+): residual addition. What stands between two arrows is one
                                                        operation, and one kernel where that is faster.

Families differ in where a layer's norms are (`norm_names.py`), and some bring another norm, attention or MLP along.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.attention_types import AttentionShape
from nanovllm.layers.attention import Attention
from nanovllm.layers.embedding import Embedding, LMHead
from nanovllm.layers.head_order import halves_order, reordered_spec, reordered_specs
from nanovllm.layers.linear import GatedLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.layers.sharded_norm import ShardedRMSNorm
from nanovllm.layers.weight_specs import WeightSpecs, with_joined
from nanovllm.model_config import ModelConfig, RopeConfig
from nanovllm.models.norm_names import PLACES, norm_names


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        hidden, qkv_bias, eps, offset = config.hidden_size, config.qkv_bias, config.rms_norm_eps, config.norm_offset
        self.qkv_proj = QKVParallelLinear(hidden, head_dim, heads, kv_heads, qkv_bias, dtype, tp, ops)
        self.o_proj = RowParallelLinear(heads * head_dim, hidden, config.o_bias, dtype, tp, ops)
        self.head_norms: tuple[RMSNorm | None, RMSNorm | None] = (None, None)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm == "head":
            self.q_norm, self.k_norm = (RMSNorm(head_dim, eps, dtype, ops, offset) for _ in range(2))
            self.head_norms = (self.q_norm, self.k_norm)
        elif config.qk_norm == "projection":
            self.q_norm, self.k_norm = (
                ShardedRMSNorm(n, held, head_dim, eps, dtype, tp, ops)
                for n, held in ((heads, tp.part(heads, "num_attention_heads")), (kv_heads, tp.kv_heads(kv_heads)))
            )
        num_heads, num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.parts = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self.attention = Attention(
            layer_idx,
            AttentionShape(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                scale=config.attention_scale,
                window=config.windows[layer_idx],
                softcap=config.attention_softcap,
            ),
            ops,
        )
        self.order = halves_order(head_dim, config.ropes[layer_idx], config.is_neox_style)
        self.norm_names = [config.norm_names.get(name, name) for name in ("q_norm", "k_norm")]

    def forward(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        qkv, residual = self.qkv_proj.after_norm(norm, x, residual)
        if isinstance(self.q_norm, ShardedRMSNorm) and self.k_norm is not None:
            q, k, v = qkv.split(self.parts, dim=-1)
            qkv = torch.cat((self.q_norm(q)[0], self.k_norm(k)[0], v), dim=-1)
        return self.o_proj(self.attention(qkv, cos_sin, ctx, *self.head_norms)), residual

    def weights(self, name: str) -> WeightSpecs:
        parts = list(self.qkv_proj.weights(f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"))
        yield from with_joined(f"{name}.qkv_proj", reordered_specs(self.qkv_proj, parts, self.order))
        yield from self.o_proj.weights(f"{name}.o_proj")
        for norm, norm_name in zip((self.q_norm, self.k_norm), self.norm_names, strict=True):
            if norm is not None:
                yield from (reordered_spec(spec, self.order) for spec in norm.weights(f"{name}.{norm_name}"))


class MLP(nn.Module):
    """layer_idx: for blocks that are given in this one's place and differ from layer to layer."""

    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = GatedLinear(hidden, (inner, inner), bias, dtype, tp, ops, activation=config.activation)
        self.down_proj = RowParallelLinear(inner, hidden, bias, dtype, tp, ops)

    def forward(self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        gated, residual = self.gate_up_proj.after_norm(norm, x, residual)
        return self.down_proj(gated), residual

    def weights(self, name: str) -> WeightSpecs:
        parts = list(self.gate_up_proj.weights(f"{name}.gate_proj", f"{name}.up_proj"))
        yield from with_joined(f"{name}.gate_up_proj", parts)
        yield from self.down_proj.weights(f"{name}.down_proj")


def rms_norm(config: ModelConfig, dtype: torch.dtype, ops: Ops) -> RMSNorm:
    """The norm of hidden states."""
    return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, ops, config.norm_offset)


MakeBlock = Callable[[ModelConfig, int, torch.dtype, TensorParallel, Ops], nn.Module]
MakeNorm = Callable[[ModelConfig, torch.dtype, Ops], nn.Module]


class DecoderLayer(nn.Module):
    """norm, attention, mlp: make its parts. A block has `forward` and `weights` as SelfAttention and MLP do."""

    def __init__(
        self,
        config: ModelConfig,
        layer_idx: int,
        dtype: torch.dtype,
        tp: TensorParallel,
        ops: Ops,
        norm: MakeNorm = rms_norm,
        attention: MakeBlock = SelfAttention,
        mlp: MakeBlock = MLP,
    ) -> None:
        super().__init__()
        self.norm_names = norm_names(config)
        norms = (norm(config, dtype, ops) if place in self.norm_names else NoNorm() for place in PLACES)
        self.before_attention, self.after_attention, self.before_mlp, self.after_mlp = norms
        self.is_parallel = config.norms == "shared"
        self.residual_scale = config.residual_scale
        self.self_attn = attention(config, layer_idx, dtype, tp, ops)
        self.mlp = mlp(config, layer_idx, dtype, tp, ops)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """x: what the layer before adds to the residual stream. Returns the same for the next layer."""
        if self.is_parallel:
            normed, residual = self.before_attention(x, residual)
            attended, _ = self.self_attn(self.before_mlp, normed, None, cos_sin, ctx)
            return attended + self.mlp(self.before_mlp, normed, None)[0], residual
        x, residual = self.self_attn(self.before_attention, x, residual, cos_sin, ctx)
        x, residual = self.mlp(self.before_mlp, self._added(x, self.after_attention), residual)
        return self._added(x, self.after_mlp), residual

    def _added(self, x: Tensor, norm: nn.Module) -> Tensor:
        """What attention or MLP adds to the residual stream."""
        if not isinstance(norm, NoNorm):
            x, _ = norm(x)
        return x if self.residual_scale == 1.0 else x * self.residual_scale

    def weights(self, name: str) -> WeightSpecs:
        yield from self.self_attn.weights(f"{name}.self_attn")  # type: ignore[operator]
        yield from self.mlp.weights(f"{name}.mlp")  # type: ignore[operator]
        for place, norm_name in self.norm_names.items():
            yield from getattr(self, place).weights(f"{name}.{norm_name}")


class LlamaForCausalLM(nn.Module):
    """max_len: positions that the rotary table must cover. ops: see `layers/ops.py`. parts: see DecoderLayer."""

    def __init__(
        self, config: ModelConfig, max_len: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops, **parts: Any
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, tp, ops)
        self.layers = nn.ModuleList(DecoderLayer(config, i, dtype, tp, ops, **parts) for i in range(config.num_layers))
        self.norm = parts.get("norm", rms_norm)(config, dtype, ops)
        distinct: list[RopeConfig] = []
        for rope in config.ropes:
            if rope is not None and rope not in distinct:
                distinct.append(rope)
        self.rotaries = nn.ModuleList(RotaryEmbedding(config.rope_dim, max_len, rope) for rope in distinct)
        self.rotary_of_layer = [None if rope is None else distinct.index(rope) for rope in config.ropes]
        tied_to = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = LMHead(config.vocab_size, config.hidden_size, dtype, tied_to, tp, ops)
        # Rounded as transformers rounds it, to the dtype of the embedding.
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=dtype, device="cpu").item()
        self.logits_scale, self.logits_softcap = config.logits_scale, config.logits_softcap

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        """input_ids, positions [num_tokens] -> hidden states [num_tokens, hidden_size], after the last norm."""
        tables = [rotary(positions, ctx.rope_lens) for rotary in self.rotaries]
        x: Tensor = self.embed_tokens(input_ids)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        residual: Tensor | None = None
        for layer, rotary in zip(self.layers, self.rotary_of_layer, strict=True):
            x, residual = layer(x, residual, None if rotary is None else tables[rotary], ctx)
        hidden, _ = self.norm(x, residual)
        return hidden  # type: ignore[no-any-return]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden_size] -> logits [num_rows, vocab_size] in the model's dtype."""
        logits: Tensor = self.lm_head(hidden)
        if self.logits_scale != 1.0:
            logits = logits * self.logits_scale
        if self.logits_softcap is not None:
            logits = (logits / self.logits_softcap).tanh_().mul_(self.logits_softcap)
        return logits

    def weights(self) -> WeightSpecs:
        yield from self.embed_tokens.weights("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            yield from layer.weights(f"model.layers.{i}")  # type: ignore[operator]
        yield from self.norm.weights("model.norm")  # type: ignore[operator]
        yield from self.lm_head.weights("lm_head")
