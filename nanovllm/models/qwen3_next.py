"""Qwen3-Next, Qwen3.5 and 3.6: gated delta nets in three layers of four, gated attention in the others.

Owns these two blocks, and the names of their tensors. Invariant: called and loaded as the blocks of `llama.py`, whose
decoder is the same.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.delta_net import DeltaNet
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpec, WeightSpecs, parameter_spec, part_spec, unfilled, with_joined
from nanovllm.model_config import ModelConfig
from nanovllm.models.hf_fields import integer
from nanovllm.models.lfm2 import conv_weights
from nanovllm.models.llama import SelfAttention


class GatedDeltaNet(nn.Module):
    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        assert config.state is not None
        shape, fields, hidden = config.state, config.extra, config.hidden_size
        self.layer_idx = layer_idx
        self.num_key_heads = integer(fields, "linear_num_key_heads")
        key_heads = tp.part(self.num_key_heads, "linear_num_key_heads")
        self.value_heads = tp.part(shape.num_heads, "linear_num_value_heads")
        keys, values = self.num_key_heads * shape.key_dim, shape.num_heads * shape.value_dim
        self.in_proj = MergedColumnParallelLinear(hidden, (keys, keys, values, values), False, dtype, tp, ops)
        self.gates = MergedColumnParallelLinear(hidden, (shape.num_heads,) * 2, False, dtype, tp, ops)
        self.out_proj = RowParallelLinear(values, hidden, False, dtype, tp, ops)
        self.num_channels = shape.conv_channels
        held = [tp.part(keys, "key channels"), tp.part(values, "value channels")]
        firsts = (0, keys), (keys, keys), (2 * keys, values)
        self.channels = [
            range(first + part.start, first + part.stop)
            for (first, _), part in zip(firsts, (held[0], *held), strict=True)
        ]
        self.conv = unfilled(shape.conv_width, sum(map(len, self.channels)), dtype=dtype)
        self.decay, self.dt_bias = (unfilled(len(self.value_heads), dtype=torch.float32) for _ in range(2))
        self.norm_weight = unfilled(shape.value_dim, dtype=dtype)
        self.eps, self.key_heads, self.delta_net = config.rms_norm_eps, len(key_heads), ops.delta_net
        self.is_interleaved = config.architecture == "Qwen3NextForCausalLM"

    def forward(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        ba, _ = self.gates.after_norm(norm, x, residual)
        qkvz, residual = self.in_proj.after_norm(norm, x, residual)
        step = ctx.groups[ctx.group_of_layer[self.layer_idx]].prepared
        net = DeltaNet(self.conv, self.decay, self.dt_bias, self.norm_weight, self.eps, self.key_heads)
        return self.out_proj(self.delta_net(qkvz, ba, net, step.layers[self.layer_idx], step)), residual

    def weights(self, name: str) -> WeightSpecs:
        name = name.removesuffix("self_attn") + "linear_attn"
        projections = list(self.in_proj.weights(*(f"{name}.in_proj_{part}" for part in ("q", "k", "v", "z"))))
        gates = list(self.gates.weights(f"{name}.in_proj_b", f"{name}.in_proj_a"))
        specs = dict(with_joined(f"{name}.in_proj_qkv", [p for p in projections if ".in_proj_z." not in p[0]]))
        specs.update([*projections, *gates])
        if self.is_interleaved:  # but in GGUF files
            specs.update(interleaved(f"{name}.in_proj_qkvz", projections, self.num_key_heads))
            specs.update(interleaved(f"{name}.in_proj_ba", gates, self.num_key_heads))
        yield from specs.items()
        yield from self.out_proj.weights(f"{name}.out_proj")
        yield from conv_weights(f"{name}.conv1d", self.num_channels, self.channels, self.conv, None)
        shape, heads = (self.num_value_heads,), slice(self.value_heads.start, self.value_heads.stop)
        decay = self.decay.data
        yield f"{name}.A_log", WeightSpec(shape, lambda tensor: decay.copy_(tensor[heads].float().exp()))
        yield part_spec(f"{name}.dt_bias", self.dt_bias, self.num_value_heads, self.value_heads)
        yield parameter_spec(f"{name}.norm.weight", self.norm_weight)

    @property
    def num_value_heads(self) -> int:
        return self.gates.spec.sizes[0]


def interleaved(name: str, parts: Sequence[tuple[str, WeightSpec]], num_heads: int) -> WeightSpecs:
    """`parts`, and the specs of a layer `name` that holds them head by head: of each head its share of every part."""
    yield from parts
    for suffix in dict.fromkeys(part_name.rpartition(".")[2] for part_name, _ in parts):
        names, specs = zip(*(part for part in parts if part[0].rpartition(".")[2] == suffix), strict=True)
        sizes = [spec.shape[0] for spec in specs]
        if any(spec.outputs != 0 or spec.shape[0] % num_heads for spec in specs):
            continue  # they are kept in another form

        def fill(tensor: Tensor, specs: Sequence[WeightSpec] = specs, sizes: Sequence[int] = sizes) -> None:
            heads = tensor[:].unflatten(0, (num_heads, -1))
            for spec, part in zip(specs, heads.split([size // num_heads for size in sizes], dim=1), strict=True):
                spec.fill(part.flatten(0, 1))

        shape = (sum(sizes), *specs[0].shape[1:])
        yield f"{name}.{suffix}", WeightSpec(shape, fill, names, specs[0].dtypes)


class GatedAttention(SelfAttention):
    """What attention finds is scaled, number by number, by a gate of its own query (Qiu et al., 2025)."""

    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__(config, layer_idx, dtype, tp, ops)
        self.num_all_heads, size = config.num_heads, config.num_heads * config.head_dim
        self.gate_proj = MergedColumnParallelLinear(config.hidden_size, [size], config.qkv_bias, dtype, tp, ops)
        self.by_row = ops.by_row

    def forward(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        gate, _ = self.gate_proj.after_norm(norm, x, residual)
        qkv, residual = self.qkv_proj.after_norm(norm, x, residual)
        found = self.attention(qkv, cos_sin, ctx, *self.head_norms)
        return self.o_proj(self.by_row(_gated, found, gate)), residual

    def weights(self, name: str) -> WeightSpecs:
        specs = dict(super().weights(name))
        gate = list(self.gate_proj.weights(f"{name}.gate_proj"))
        queries = [(f"{name}.query_proj.{suffix}", specs.pop(f"{name}.q_proj.{suffix}")) for suffix in _suffixes(gate)]
        joined = {part for part in specs if part.startswith(f"{name}.qkv_proj.")}
        yield from ((part, spec) for part, spec in specs.items() if part not in joined)
        yield from interleaved(f"{name}.q_proj", queries + gate, self.num_all_heads)


def _suffixes(parts: Sequence[tuple[str, WeightSpec]]) -> list[str]:
    return [name.rpartition(".")[2] for name, _ in parts]


def _gated(found: Tensor, gate: Tensor) -> Tensor:
    return found * gate.sigmoid()


def mixer(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """What stands before the MLP."""
    block = GatedAttention if config.windows[layer_idx] is None else GatedDeltaNet
    return block(config, layer_idx, dtype, tp, ops)
