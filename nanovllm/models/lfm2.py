"""LFM2 (Liquid AI, 2025): gated short convolutions in most layers, attention in the others.

Owns the convolution's layer, and the names of the family's tensors. Invariant: called and loaded as the blocks of
`llama.py`, whose decoder is the same.
"""

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpec, WeightSpecs, with_joined
from nanovllm.model_config import ModelConfig
from nanovllm.models.hf_fields import flag
from nanovllm.models.llama import MLP, LlamaForCausalLM, SelfAttention


class ShortConv(nn.Module):
    """Of each token three vectors b, c and x: c * convolution(b * x), where each channel is convolved by itself."""

    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        assert config.state is not None
        hidden, bias = config.hidden_size, flag(config.extra, "conv_bias")
        self.layer_idx = layer_idx
        self.in_proj = MergedColumnParallelLinear(hidden, (hidden,) * 3, bias, dtype, tp, ops)
        self.out_proj = RowParallelLinear(hidden, hidden, bias, dtype, tp, ops)
        self.channels = tp.part(hidden, "hidden_size")
        shape = config.state.conv_width, len(self.channels)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(shape[1], dtype=dtype), requires_grad=False) if bias else None
        self.num_channels, self.convolve = hidden, ops.short_conv

    def forward(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        bcx, residual = self.in_proj.after_norm(norm, x, residual)
        step = ctx.groups[ctx.group_of_layer[self.layer_idx]].prepared
        state = step.layers[self.layer_idx].conv
        return self.out_proj(self.convolve(bcx, self.weight, self.bias, state, step)), residual

    def weights(self, name: str) -> WeightSpecs:
        name = name.removesuffix("self_attn") + "conv"
        parts = list(self.in_proj.weights(f"{name}.b_proj", f"{name}.c_proj", f"{name}.x_proj"))
        yield from with_joined(f"{name}.in_proj", parts)
        yield from self.out_proj.weights(f"{name}.out_proj")
        yield from conv_weights(f"{name}.conv", self.num_channels, [self.channels], self.weight, self.bias)


def conv_weights(name: str, num_channels: int, held: list[range], weight: Tensor, bias: Tensor | None) -> WeightSpecs:
    """The specs of a causal convolution. held: this rank's channels; weight [width, channels], bias [channels]."""

    def part(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[channels.start : channels.stop] for channels in held])

    shape = (num_channels, 1, weight.shape[0])
    yield f"{name}.weight", WeightSpec(shape, lambda tensor: weight.data.copy_(part(tensor)[:, 0].T))
    if bias is not None:
        yield f"{name}.bias", WeightSpec((num_channels,), lambda tensor: bias.data.copy_(part(tensor)))


class Lfm2Attention(SelfAttention):
    def weights(self, name: str) -> WeightSpecs:
        list(self.o_proj.weights(f"{name}.out_proj"))  # the first call gives it its name
        yield from super().weights(name)


def operator(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """What stands before the MLP."""
    block = Lfm2Attention if config.windows[layer_idx] is None else ShortConv
    return block(config, layer_idx, dtype, tp, ops)


class Lfm2MLP(MLP):
    def weights(self, name: str) -> WeightSpecs:
        name = name.removesuffix("mlp") + "feed_forward"
        parts = list(self.gate_up_proj.weights(f"{name}.w1", f"{name}.w3"))
        yield from with_joined(f"{name}.gate_up_proj", parts)
        yield from self.down_proj.weights(f"{name}.w2")


class Lfm2ForCausalLM(LlamaForCausalLM):
    def weights(self) -> WeightSpecs:
        for name, spec in super().weights():
            yield name.replace("model.norm.", "model.embedding_norm."), spec
