"""Experts without a gate, as Nemotron 3 has them: up projection, relu(x)^2, down projection.

Owns how their tensors map to what is held, and the shared expert of that kind. Invariant: held as `DenseExperts`, with
the up projection alone in the place of gate and up.

    mixer.experts.7.up_proj.weight     [intermediate, hidden]                  or all in one, mixer.experts.up_proj
    mixer.experts.7.down_proj.weight   [hidden, intermediate]                                 mixer.experts.down_proj
"""

import torch
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe import relu2
from nanovllm.layers.experts import DenseExperts, ExpertNames
from nanovllm.layers.linear import MergedColumnParallelLinear
from nanovllm.layers.ops import Ops
from nanovllm.layers.shared_expert import PartialSum
from nanovllm.layers.weight_specs import WeightSpec, WeightSpecs


class UngatedExperts(DenseExperts):
    def weights(self, layer: str, names: ExpertNames) -> WeightSpecs:
        num_experts, hidden, _ = self.down.shape
        size, held = self.intermediate_size, slice(self.held.start, self.held.stop)
        block, up, down = f"{layer}{names.block}.experts", self.gate_up.data, self.down.data
        up_names, down_names = (
            tuple(f"{block}.{expert}.{projection}.weight" for expert in range(num_experts))
            for projection in (names.up, names.down)
        )
        for expert in range(num_experts):
            yield up_names[expert], self.rows(up[expert])
            yield down_names[expert], self.columns(down[expert])
        shape = num_experts, size, hidden
        yield f"{block}.{names.up}", WeightSpec(shape, lambda tensor: up.copy_(tensor[:, held]), up_names)
        shape = num_experts, hidden, size
        yield f"{block}.{names.down}", WeightSpec(shape, lambda tensor: down.copy_(tensor[:, :, held]), down_names)


class UngatedSharedExpert(nn.Module):
    """Called and loaded as `SharedExpert`. block: its name, seen from the layer."""

    def __init__(
        self, hidden: int, size: int, bias: bool, block: str, dtype: torch.dtype, tp: TensorParallel, ops: Ops
    ) -> None:
        super().__init__()
        self.block, self.by_row = block, ops.by_row
        self.up_proj = MergedColumnParallelLinear(hidden, [size], bias, dtype, tp, ops)
        self.down_proj = PartialSum(size, hidden, bias, dtype, tp, ops)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.by_row(relu2, self.up_proj(x)))
        return result

    def weights(self, layer: str) -> WeightSpecs:
        yield from self.up_proj.weights(f"{layer}{self.block}.up_proj")
        yield from self.down_proj.weights(f"{layer}{self.block}.down_proj")
