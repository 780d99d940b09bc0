"""The dense decoder of Llama, SmolLM2, Mistral, Qwen2 and Qwen3: one definition, with switches from ModelConfig.

Owns the order of operations and the names of the checkpoint's tensors. Invariant: stateless; a forward pass depends on
its arguments and the weights only.

    input_ids -> embedding -> [ (+) norm, QKV -> rotation, KV store -> attention -> O -> (+) norm, gate, up -> down ]
              -> (+) norm -> head -> logits             (+): residual addition. What stands between two arrows is one
                                                        operation, and one kernel where that is faster.
"""

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.config import ModelConfig
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.ops import Ops
from nanovllm.layers.attention import Attention
from nanovllm.layers.embedding import Embedding, LMHead
from nanovllm.layers.linear import GatedLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.layers.slots import Slots


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        hidden, qkv_bias = config.hidden_size, config.qkv_bias
        self.qkv_proj = QKVParallelLinear(hidden, head_dim, heads, kv_heads, qkv_bias, dtype, tp, ops)
        self.o_proj = RowParallelLinear(heads * head_dim, hidden, config.o_bias, dtype, tp, ops)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps, dtype, ops) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps, dtype, ops) if config.qk_norm else None
        num_heads, num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.attention = Attention(layer_idx, num_heads, num_kv_heads, head_dim, config.windows[layer_idx], ops)

    def forward(
        self, norm: RMSNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        qkv, residual = self.qkv_proj.after_norm(norm, x, residual)
        return self.o_proj(self.attention(qkv, cos_sin, ctx, self.q_norm, self.k_norm)), residual

    def slots(self, name: str) -> Slots:
        yield from self.qkv_proj.slots(f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj")
        yield from self.o_proj.slots(f"{name}.o_proj")
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.slots(f"{name}.q_norm")
            yield from self.k_norm.slots(f"{name}.k_norm")


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = GatedLinear(hidden, (inner, inner), config.mlp_bias, dtype, tp, ops)
        self.down_proj = RowParallelLinear(inner, hidden, config.mlp_bias, dtype, tp, ops)

    def forward(self, norm: RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        gated, residual = self.gate_up_proj.after_norm(norm, x, residual)
        return self.down_proj(gated), residual

    def slots(self, name: str) -> Slots:
        yield from self.gate_up_proj.slots(f"{name}.gate_proj", f"{name}.up_proj")
        yield from self.down_proj.slots(f"{name}.down_proj")


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, ops)
        self.self_attn = SelfAttention(config, layer_idx, dtype, tp, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, ops)
        self.mlp = MLP(config, dtype, tp, ops)

    def forward(
        self, x: Tensor, residual: Tensor | None, cos_sin: Tensor, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """x: what the layer before adds to the residual stream. Returns the same for the next layer."""
        x, residual = self.self_attn(self.input_layernorm, x, residual, cos_sin, ctx)
        return self.mlp(self.post_attention_layernorm, x, residual)

    def slots(self, name: str) -> Slots:
        yield from self.input_layernorm.slots(f"{name}.input_layernorm")
        yield from self.self_attn.slots(f"{name}.self_attn")
        yield from self.post_attention_layernorm.slots(f"{name}.post_attention_layernorm")
        yield from self.mlp.slots(f"{name}.mlp")


class LlamaForCausalLM(nn.Module):
    """max_len: positions that the rotary table must cover. ops: see `kernels/ops.py`."""

    def __init__(self, config: ModelConfig, max_len: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, tp)
        self.layers = nn.ModuleList(DecoderLayer(config, i, dtype, tp, ops) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, ops)
        self.rotary = RotaryEmbedding(config.head_dim, max_len, config.rope)
        tied_to = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = LMHead(config.vocab_size, config.hidden_size, dtype, tied_to, tp, ops)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        """input_ids, positions [num_tokens] -> hidden states [num_tokens, hidden_size], after the last norm."""
        cos_sin = self.rotary(positions, ctx.rope_lens)
        x: Tensor = self.embed_tokens(input_ids)
        residual: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, cos_sin, ctx)
        hidden, _ = self.norm(x, residual)
        return hidden  # type: ignore[no-any-return]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [num_rows, hidden_size] -> logits [num_rows, vocab_size] in the model's dtype."""
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    def slots(self) -> Slots:
        yield from self.embed_tokens.slots("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            yield from layer.slots(f"model.layers.{i}")  # type: ignore[operator]
        yield from self.norm.slots("model.norm")
        yield from self.lm_head.slots("lm_head")
