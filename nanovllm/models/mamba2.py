"""The Mamba-2 layer (Dao and Gu, 2024) of hybrid models.

Owns its projections, which part of its heads a rank holds, and the names of its tensors. Invariant: called and loaded
as the blocks of `llama.py`.
"""

import torch
from torch import Tensor, nn

from nanovllm.attention.backend import ForwardContext
from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.mamba2 import Mamba2
from nanovllm.layers.linear import LinearBase, RowParallelLinear
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.sharded_norm import ShardedRMSNorm
from nanovllm.layers.weight_specs import WeightSpec, WeightSpecs, part_spec, unfilled, with_joined
from nanovllm.model_config import ModelConfig
from nanovllm.models.lfm2 import conv_weights

_PARTS = ("z", "x", "b", "c", "dt")


class Mamba2Mixer(nn.Module):
    """Ranks share the heads; of groups of heads that share b and c either each has some, or all have the only one."""

    def __init__(
        self,
        config: ModelConfig,
        layer_idx: int,
        dtype: torch.dtype,
        tp: TensorParallel,
        ops: Ops,
        *,
        conv_bias: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        assert config.state is not None
        shape, hidden, eps = config.state, config.hidden_size, config.rms_norm_eps
        self.layer_idx, self.num_heads = layer_idx, shape.num_heads
        self.heads = tp.part(shape.num_heads, "Mamba-2 heads")
        is_shared = shape.num_key_heads == 1
        groups = range(1) if is_shared else tp.part(shape.num_key_heads, "groups of Mamba-2 heads")
        values, keys = (_scaled(self.heads, shape.value_dim), _scaled(groups, shape.key_dim))
        num_values, num_keys = shape.num_heads * shape.value_dim, shape.num_key_heads * shape.key_dim
        sizes = num_values, num_values, num_keys, num_keys, shape.num_heads
        parts = values, values, keys, keys, self.heads
        self.in_proj = LinearBase(LinearSpec(sizes, parts, hidden, range(hidden), dtype), bias, ops)
        self.out_proj = RowParallelLinear(num_values, hidden, bias, dtype, tp, ops)
        self.num_channels = shape.conv_channels
        firsts = 0, num_values, num_values + num_keys
        self.channels = [
            range(first + part.start, first + part.stop)
            for first, part in zip(firsts, (values, keys, keys), strict=True)
        ]
        channels = sum(map(len, self.channels))
        self.conv = unfilled(shape.conv_width, channels, dtype=dtype)
        self.conv_bias = unfilled(channels, dtype=dtype) if conv_bias else None
        self.decay, self.dt_bias, self.skip = (unfilled(len(self.heads), dtype=torch.float32) for _ in range(3))
        self.norm = ShardedRMSNorm(shape.num_heads, self.heads, shape.value_dim, eps, dtype, tp, ops)
        self.is_norm_apart = is_shared and tp.size > 1  # one norm over the heads of all ranks
        self.num_groups, self.state_dim, self.mamba2 = len(groups), shape.key_dim, ops.mamba2

    def forward(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None, cos_sin: Tensor | None, ctx: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        zxbcdt, residual = self.in_proj.after_norm(norm, x, residual)
        step = ctx.groups[ctx.group_of_layer[self.layer_idx]].prepared
        net = Mamba2(
            *(self.conv, self.conv_bias, self.decay, self.dt_bias, self.skip),
            None if self.is_norm_apart else self.norm.weight,
            *(self.norm.eps, self.num_groups, self.state_dim),
        )
        y = self.mamba2(zxbcdt, net, step.layers[self.layer_idx], step)
        return self.out_proj(self.norm(y)[0] if self.is_norm_apart else y), residual

    def weights(self, name: str) -> WeightSpecs:
        yield from with_joined(f"{name}.in_proj", list(self.in_proj.weights(*(f"{name}.in_proj_{p}" for p in _PARTS))))
        yield from self.out_proj.weights(f"{name}.out_proj")
        yield from conv_weights(f"{name}.conv1d", self.num_channels, self.channels, self.conv, self.conv_bias)
        shape, heads = (self.num_heads,), slice(self.heads.start, self.heads.stop)
        decay = self.decay.data
        yield f"{name}.A_log", WeightSpec(shape, lambda tensor: decay.copy_(tensor[heads].float().exp()))
        yield part_spec(f"{name}.dt_bias", self.dt_bias, self.num_heads, self.heads)
        yield part_spec(f"{name}.D", self.skip, self.num_heads, self.heads)
        yield from self.norm.weights(f"{name}.norm")


def _scaled(part: range, size: int) -> range:
    return range(part.start * size, part.stop * size)
