"""Gemma 4: layers whose heads differ, layers that read the keys and values of others, and an input for each layer.

Owns its decoder and the names of its tensors. Invariant: stateless, as the decoder of `llama.py`; a layer without keys
and values of its own finds those that it reads at its place in the context (`ModelConfig.kv_sources`).

    input_ids -> embedding -> x --+--> [ norm, attention, norm (+) norm, MLP (and experts), norm (+)
              -> table of all layers   -> gate, its share of y, projection, norm (+) -> times a number ] -> norm -> head
                 + projection of x = y

Values are normed, without a weight; where `attention_k_eq_v` says so, they are the keys before their norm.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.attention_types import AttentionShape
from nanovllm.kernels.moe import Gate
from nanovllm.kernels.qkv_rope_store import norm_and_rotate
from nanovllm.kernels.routing import Routing, route
from nanovllm.layers.embedding import Embedding, LMHead
from nanovllm.layers.experts import ExpertNames, Experts, StackedNames
from nanovllm.layers.linear import Linear, MergedColumnParallelLinear, RowParallelLinear
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.rotary import RotaryEmbedding
from nanovllm.layers.weight_specs import WeightSpec, WeightSpecs, parameter_spec, unfilled
from nanovllm.model_config import ModelConfig, RopeConfig
from nanovllm.models.hf_fields import MAX_EXPERTS, flag, integer
from nanovllm.models.llama import MLP, LlamaForCausalLM, SelfAttention, rms_norm


def _of_layer(config: ModelConfig, layer_idx: int) -> ModelConfig:
    """With this layer's heads and width in the place of those that all layers share."""
    num_kv_heads, head_dim = config.layer_heads[layer_idx]
    is_wide = config.kv_source(layer_idx) != layer_idx and flag(config.extra, "use_double_wide_mlp")
    width = config.intermediate_size * (2 if is_wide else 1)
    return replace(config, num_kv_heads=num_kv_heads, head_dim=head_dim, intermediate_size=width)


class NormedValuesAttention(SelfAttention):
    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__(config, layer_idx, dtype, tp, ops)
        self.values_are_keys = config.windows[layer_idx] is None and flag(config.extra, "attention_k_eq_v")
        self.register_buffer("ones", torch.ones(config.head_dim, dtype=dtype), persistent=False)
        self.ones: Tensor
        self.eps = config.rms_norm_eps

    def forward(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        qkv, residual = self.qkv_proj.after_norm(norm, x, residual)
        values = qkv[:, -self.parts[2] :]
        by_head = values.unflatten(1, (-1, len(self.ones))).contiguous()
        values.copy_(self.attention.ops.rms_norm(by_head, self.ones, self.eps).flatten(1))
        return self.o_proj(self.attention(qkv, cos_sin, ctx, *self.head_norms)), residual

    def weights(self, name: str) -> WeightSpecs:
        """Where values are keys, one matrix of the checkpoint fills the rows of both."""
        specs = dict(super().weights(name))
        if self.values_are_keys:
            specs = {other: spec for other, spec in specs.items() if ".qkv_proj." not in other}
            for of_values in [other for other in specs if ".v_proj." in other]:
                of_keys = of_values.replace(".v_proj.", ".k_proj.")
                specs[of_keys] = _filling_both(specs[of_keys], specs.pop(of_values))
        yield from specs.items()


def _filling_both(first: WeightSpec, second: WeightSpec) -> WeightSpec:
    def fill(tensor: Tensor) -> None:
        first.fill(tensor)
        second.fill(tensor)

    return first._replace(fill=fill, place=None)


class SharedAttention(nn.Module):
    """Attention over the keys and values of another layer: queries are all that is made here."""

    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        size, hidden, bias = config.num_heads * config.head_dim, config.hidden_size, config.qkv_bias
        self.q_proj = MergedColumnParallelLinear(hidden, (size,), bias, dtype, tp, ops)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype, ops)
        self.o_proj = RowParallelLinear(size, hidden, config.o_bias, dtype, tp, ops)
        num_heads = len(tp.part(config.num_heads, "num_attention_heads"))
        num_kv_heads = len(tp.kv_heads(config.num_kv_heads))
        window, scale = config.windows[layer_idx], config.attention_scale
        self.shape = AttentionShape(num_heads, num_kv_heads, config.head_dim, scale, window)
        self.layer_idx, self.by_row = layer_idx, ops.by_row
        self.unread = config.hidden_size, config.num_kv_heads * config.head_dim, config.head_dim

    def forward(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        q, residual = self.q_proj.after_norm(norm, x, residual)
        cache = ctx.kv_caches[self.layer_idx]
        group = ctx.groups[ctx.group_of_layer[self.layer_idx]]
        weight, eps, slots = self.q_norm.weight, self.q_norm.eps, group.slot_mapping
        q = self.by_row(lambda q, cos_sin: norm_and_rotate(q, cos_sin, weight, eps, cache, slots), q, cos_sin)
        return self.o_proj(ctx.backend.forward(self.shape, q, cache, group.prepared).flatten(1)), residual

    def weights(self, name: str) -> WeightSpecs:
        yield from self.q_proj.weights(f"{name}.q_proj")
        yield from self.q_norm.weights(f"{name}.q_norm")
        yield from self.o_proj.weights(f"{name}.o_proj")
        hidden, size, head_dim = self.unread  # released checkpoints have these, and nobody reads them
        shapes = {"k_proj": (size, hidden), "v_proj": (size, hidden), "k_norm": (head_dim,)}
        for other, shape in shapes.items():
            unread = f"{name}.{other}.weight"
            yield unread, WeightSpec(shape, lambda tensor: None, instead_of=(unread,))


class Gemma4Experts(Experts):
    """Beside the MLP, on the same residual stream, with a norm of their own before them; so has the router."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        fields = config.extra
        num_experts = integer(fields, "num_experts", high=MAX_EXPERTS)
        size, top_k = integer(fields, "moe_intermediate_size"), integer(fields, "top_k_experts", high=num_experts)
        names = ExpertNames("moe", stacked=(StackedNames("experts.gate_up_proj", "experts.down_proj"),))
        gate = Gate(config.activation)
        super().__init__(config.hidden_size, size, num_experts, Routing(top_k), names, dtype, tp, ops, gate=gate)
        self.before_router, self.before = rms_norm(config, dtype, ops), rms_norm(config, dtype, ops)
        self.expert_scale = unfilled(num_experts, dtype=torch.float32)

    def added(self, total: Tensor) -> Tensor:
        """total [num_tokens, hidden_size]: the residual stream -> what the experts make of it."""
        weights, expert_ids = route(self.router(self.before_router(total)[0]), None, self.routing)
        weights = weights * self.expert_scale[expert_ids.long()]
        return self.tp.all_reduce(self.method.mix(self.before(total)[0], weights, expert_ids))

    def weights(self, name: str) -> WeightSpecs:
        if self.method is None:
            self.method = self.make_method(self.spec, name, self.names)
        yield from self.method.weights(name, self.names)
        yield from self.router.weights(f"{name}router.proj")
        scale, root = self.before_router.weight.data, len(self.before_router.weight) ** -0.5
        yield f"{name}router.scale", WeightSpec(tuple(scale.shape), lambda tensor: scale.copy_(tensor[:] * root))
        yield parameter_spec(f"{name}router.per_expert_scale", self.expert_scale)
        yield from self.before.weights(f"{name}pre_feedforward_layernorm_2")


class Gemma4Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        own, hidden, size = _of_layer(config, layer_idx), config.hidden_size, _input_size(config)
        attention = NormedValuesAttention if config.kv_source(layer_idx) == layer_idx else SharedAttention
        self.self_attn = attention(own, layer_idx, dtype, tp, ops)
        self.mlp = MLP(own, layer_idx, dtype, tp, ops)
        self.norms = nn.ModuleDict({name: rms_norm(config, dtype, ops) for name in _NORMS})
        self.layer_scalar = unfilled(1, dtype=dtype)
        self.experts: Gemma4Experts | None = None
        if flag(config.extra, "enable_moe_block"):
            self.experts = Gemma4Experts(config, dtype, tp, ops)
            self.norms.update({f"post_feedforward_layernorm_{i}": rms_norm(config, dtype, ops) for i in (1, 2)})
        self.gate, self.projection, self.gelu_and_mul = None, None, ops.gelu_and_mul
        if size:
            self.gate = Linear(hidden, size, False, dtype, ops)
            self.projection = Linear(size, hidden, False, dtype, ops)
            self.norms["post_per_layer_input_norm"] = rms_norm(config, dtype, ops)

    def forward(
        self, x: Tensor, residual: None, cos_sin: Tensor, ctx: ForwardContext, own_input: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Called as `llama.DecoderLayer`, but x is the whole residual stream, [num_tokens, hidden_size], before this
        layer; returns it behind the layer."""
        norms = self.norms
        attended, before = self.self_attn(norms["input_layernorm"], x, None, cos_sin, ctx)
        attended, _ = norms["post_attention_layernorm"](attended)
        added, total = self.mlp(norms["pre_feedforward_layernorm"], attended, before)
        if self.experts is not None:
            added, _ = norms["post_feedforward_layernorm_1"](added)
            added = added + norms["post_feedforward_layernorm_2"](self.experts.added(total))[0]
        total = total + norms["post_feedforward_layernorm"](added)[0]
        if self.gate is not None and self.projection is not None and own_input is not None:
            gated = self.gelu_and_mul(torch.cat((self.gate(total), own_input), dim=1))
            total = total + norms["post_per_layer_input_norm"](self.projection(gated))[0]
        return total * self.layer_scalar, None

    def weights(self, name: str) -> WeightSpecs:
        yield from self.self_attn.weights(f"{name}.self_attn")
        yield from self.mlp.weights(f"{name}.mlp")
        for norm_name, norm in self.norms.items():
            yield from norm.weights(f"{name}.{norm_name}")  # type: ignore[operator]
        yield parameter_spec(f"{name}.layer_scalar", self.layer_scalar)
        if self.experts is not None:
            yield from self.experts.weights(f"{name}.")
        if self.gate is not None and self.projection is not None:
            yield from self.gate.weights(f"{name}.per_layer_input_gate")
            yield from self.projection.weights(f"{name}.per_layer_projection")


_NORMS = "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"


def _input_size(config: ModelConfig) -> int:
    """Of what each layer gets of every token; 0 where there is none."""
    return integer(config.extra, "hidden_size_per_layer_input", low=0)


class LayerInputs(nn.Module):
    """An input for each layer (per-layer embeddings): of the token by itself, and of its embedding."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        self.size, hidden = _input_size(config), config.hidden_size
        width, vocab_size = config.num_layers * self.size, integer(config.extra, "vocab_size_per_layer_input")
        self.table = Embedding(vocab_size, width, dtype, tp, ops)
        self.projection = Linear(hidden, width, False, dtype, ops)
        self.norm = RMSNorm(self.size, config.rms_norm_eps, dtype, ops)
        self.table_scale = _rounded(self.size**0.5, dtype)
        self.projection_scale = hidden**-0.5

    def forward(self, input_ids: Tensor, x: Tensor) -> Tensor:
        """[num_tokens, num_layers, size]"""
        of_tokens = (self.table(input_ids) * self.table_scale).unflatten(1, (-1, self.size))
        projected = (self.projection(x) * self.projection_scale).unflatten(1, (-1, self.size))
        return (self.norm(projected.contiguous())[0] + of_tokens) * 2**-0.5

    def weights(self) -> WeightSpecs:
        yield from self.table.weights("model.embed_tokens_per_layer")
        yield from self.projection.weights("model.per_layer_model_projection")
        yield from self.norm.weights("model.per_layer_projection_norm")


def _rounded(scale: float, dtype: torch.dtype) -> float:
    """As transformers rounds it, to the dtype of the table."""
    return torch.tensor(scale, dtype=dtype, device="cpu").item()


class Gemma4ForCausalLM(LlamaForCausalLM):
    def __init__(self, config: ModelConfig, max_len: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        nn.Module.__init__(self)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, tp, ops)
        self.layer_inputs = LayerInputs(config, dtype, tp, ops) if _input_size(config) else None
        self.layers = nn.ModuleList(Gemma4Layer(config, i, dtype, tp, ops) for i in range(config.num_layers))
        self.norm = rms_norm(config, dtype, ops)
        kinds = [(head_dim, rope) for (_, head_dim), rope in zip(config.layer_heads, config.ropes, strict=True)]
        distinct: list[tuple[int, RopeConfig]] = []
        for head_dim, rope in kinds:
            if rope is not None and (head_dim, rope) not in distinct:
                distinct.append((head_dim, rope))
        self.rotaries = nn.ModuleList(RotaryEmbedding(head_dim, max_len, rope) for head_dim, rope in distinct)
        self.rotary_of_layer = [distinct.index(kind) for kind in kinds]  # type: ignore[arg-type]
        tied_to = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = LMHead(config.vocab_size, config.hidden_size, dtype, tied_to, tp, ops)
        self.embedding_scale = _rounded(config.embedding_scale, dtype)
        self.logits_scale, self.logits_softcap = config.logits_scale, config.logits_softcap

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: ForwardContext) -> Tensor:
        tables = [rotary(positions, ctx.rope_lens) for rotary in self.rotaries]
        x: Tensor = self.embed_tokens(input_ids) * self.embedding_scale
        inputs = None if self.layer_inputs is None else self.layer_inputs(input_ids, x)
        for i, layer in enumerate(self.layers):
            own_input = None if inputs is None else inputs[:, i]
            x, _ = layer(x, None, tables[self.rotary_of_layer[i] or 0], ctx, own_input)
        hidden, _ = self.norm(x)
        return hidden  # type: ignore[no-any-return]

    def weights(self) -> WeightSpecs:
        yield from super().weights()
        if self.layer_inputs is not None:
            yield from self.layer_inputs.weights()
