"""Feed-forward blocks without a gate: up projection, activation, down projection.

Owns their activations and tensor names. Invariant: called and loaded as `llama.MLP`.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe import relu2
from nanovllm.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpecs, parameter_spec
from nanovllm.model_config import ModelConfig

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
}


class UngatedMLP(nn.Module):
    up_name, down_name = "up_proj", "down_proj"

    def __init__(self, config: ModelConfig, layer_idx: int, dtype: torch.dtype, tp: TensorParallel, ops: Ops) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = MergedColumnParallelLinear(hidden, [inner], bias, dtype, tp, ops)
        self.down_proj = RowParallelLinear(inner, hidden, bias, dtype, tp, ops)
        self.activate = self.activation(config, dtype)
        self.by_row = ops.by_row

    def activation(self, config: ModelConfig, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return _ACTIVATIONS[config.activation]

    def forward(self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        up, residual = self.up_proj.after_norm(norm, x, residual)
        return self.down_proj(self.by_row(self.activate, up)), residual

    def weights(self, name: str) -> WeightSpecs:
        yield from self.up_proj.weights(f"{name}.{self.up_name}")
        yield from self.down_proj.weights(f"{name}.{self.down_name}")


class StarCoder2MLP(UngatedMLP):
    up_name, down_name = "c_fc", "c_proj"


class XIELU(nn.Module):
    """xIELU (Huang and Schlag, 2024): quadratic above 0, an integrated ELU below, each with a learned slope.

    The four numbers are the checkpoint's, and those that are learned are kept as it has them: before softplus.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n, self.beta, self.eps = (
            nn.Parameter(torch.empty(1, dtype=dtype), requires_grad=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        above, below = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        return torch.where(x > 0, above * x * x, below * (torch.expm1(x.minimum(self.eps)) - x)) + self.beta * x

    def weights(self, name: str) -> WeightSpecs:
        for own_name, number in self.named_parameters():
            yield parameter_spec(f"{name}.{own_name}", number)


class XIELUMLP(UngatedMLP):
    def activation(self, config: ModelConfig, dtype: torch.dtype) -> XIELU:
        return XIELU(dtype)

    def weights(self, name: str) -> WeightSpecs:
        yield from super().weights(name)
        yield from self.activate.weights(f"{name}.act_fn")  # type: ignore[attr-defined]
