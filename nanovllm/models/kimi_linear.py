"""Kimi-Linear (Kimi Team, 2025): Kimi delta attention in most layers, latent attention without rotation in the others.

Owns the first of these blocks, and the names of its tensors; the second is `latent.py`'s. Invariant: called and loaded
as the blocks of `llama.py`, whose decoder is the same.
"""

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.kimi_delta import KimiDelta
from nanovllm.layers.linear import LinearBase, MergedColumnParallelLinear, RowParallelLinear
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpec, WeightSpecs, parameter_spec, part_spec, unfilled
from nanovllm.model_config import ModelConfig
from nanovllm.models.latent import LatentAttention
from nanovllm.models.lfm2 import conv_weights
from nanovllm.models.llama import MLP
from nanovllm.models.mixture import MIXTRAL_NAMES, deepseek_moe


class KimiDeltaAttention(nn.Module):
    """What is forgotten, and the gate of the output, come of products of a low rank, which every rank has whole."""

    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        assert config.state is not None
        num_heads, dim, hidden = config.state.num_heads, config.state.value_dim, config.hidden_size
        self.layer_idx, self.eps, self.kimi_delta = layer_idx, config.rms_norm_eps, ops.kimi_delta
        self.heads = tp.part(num_heads, "linear_num_heads")
        values = num_heads * dim
        self.channels = tp.part(values, "channels")
        low = range(dim)
        parts = self.channels, self.channels, self.channels, self.heads, low, low
        spec = LinearSpec((values, values, values, num_heads, dim, dim), parts, hidden, range(hidden), dtype)
        self.in_proj = LinearBase(spec, False, ops)
        self.f_proj, self.z_proj = (MergedColumnParallelLinear(dim, [values], False, dtype, tp, ops) for _ in range(2))
        self.o_proj = RowParallelLinear(values, hidden, False, dtype, tp, ops)
        self.num_values, held = values, len(self.channels)
        self.conv = unfilled(config.state.conv_width, 3 * held, dtype=dtype)
        self.decay, self.dt_bias = (unfilled(size, dtype=torch.float32) for size in (len(self.heads), held))
        self.norm_weight = unfilled(dim, dtype=dtype)

    def forward(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        parts, residual = self.in_proj.after_norm(norm, x, residual)
        dim = self.norm_weight.shape[0]
        qkv, b, f, z = parts.split([self.conv.shape[1], len(self.heads), dim, dim], dim=-1)
        f, z = self.f_proj(f.contiguous()), self.z_proj(z.contiguous())
        step = ctx.groups[ctx.group_of_layer[self.layer_idx]].prepared
        net = KimiDelta(self.conv, self.decay, self.dt_bias, self.norm_weight, self.eps)
        return self.o_proj(self.kimi_delta(qkv, f, b, z, net, step.layers[self.layer_idx], step)), residual

    def weights(self, name: str) -> WeightSpecs:
        yield from self.in_proj.weights(*(f"{name}.{part}_proj" for part in ("q", "k", "v", "b", "f_a", "g_a")))
        yield from self.f_proj.weights(f"{name}.f_b_proj")
        yield from self.z_proj.weights(f"{name}.g_b_proj")
        yield from self.o_proj.weights(f"{name}.o_proj")
        for part, weight in zip("qkv", self.conv.chunk(3, dim=1), strict=True):
            yield from conv_weights(f"{name}.{part}_conv1d", self.num_values, [self.channels], weight, None)
        decay, heads = self.decay.data, slice(self.heads.start, self.heads.stop)
        shape = (1, 1, self.in_proj.spec.sizes[3], 1)
        yield f"{name}.A_log", WeightSpec(shape, lambda tensor: decay.copy_(tensor[0, 0, heads, 0].float().exp()))
        yield part_spec(f"{name}.dt_bias", self.dt_bias, self.num_values, self.channels)
        yield parameter_spec(f"{name}.o_norm.weight", self.norm_weight)


class KimiMLP(MLP):
    def weights(self, name: str) -> WeightSpecs:
        """Transformers writes layers without experts under the name of those that have them, and reads both."""
        other = name.removesuffix("mlp") + "block_sparse_moe"
        for tensor, spec in super().weights(name):
            yield tensor, spec
            yield tensor.replace(name, other), spec._replace(instead_of=spec.instead_of or (tensor,))


def mixer(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """What stands before the MLP."""
    block = LatentAttention if config.windows[layer_idx] is None else KimiDeltaAttention
    return block(config, layer_idx, dtype, tp, ops)


def mlp(config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> nn.Module:
    """As in DeepSeek-V3, under Mixtral's names."""
    return deepseek_moe(config, layer_idx, dtype, tp, ops, MIXTRAL_NAMES, KimiMLP)
