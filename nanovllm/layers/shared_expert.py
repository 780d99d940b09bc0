"""The shared expert of a mixture (DeepSeekMoE; Dai et al., 2024): a feed-forward layer that every token goes through.

Owns its weights and its gate. Invariant: returns this rank's part of the sum; `Experts`, which adds it to its own, has
the ranks' parts added up.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe import Shared
from nanovllm.kernels.routing import sigmoid
from nanovllm.layers.fused_linear import FusedLinear
from nanovllm.layers.linear import GatedLinear, Linear, LinearBase, RowParallelLinear
from nanovllm.layers.ops import Ops
from nanovllm.layers.weight_specs import WeightSpecs, with_joined


class SharedExpertNames(NamedTuple):
    """In the checkpoint: the block, seen from the layer, its joined gate and up projection, the down projection."""

    block: str
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"


class PartialSum(RowParallelLinear):
    """A row-parallel layer that leaves adding up the ranks' results to its caller."""

    def forward(self, x: Tensor) -> Tensor:
        return LinearBase.forward(self, x)


class SharedExpert(nn.Module):
    """gate: the checkpoint's name, seen from the layer, of a linear layer whose sigmoid scales each token's result."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool,
        names: SharedExpertNames,
        dtype: torch.dtype,
        tp: TensorParallel,
        ops: Ops,
        gate: str | None = None,
    ) -> None:
        super().__init__()
        self.names, self.gate_name = names, gate
        sizes = (intermediate_size, intermediate_size)
        self.gate_up_proj = GatedLinear(hidden_size, sizes, bias, dtype, tp, ops, activation="silu")
        self.down_proj = PartialSum(intermediate_size, hidden_size, bias, dtype, tp, ops)
        self.gate = None if gate is None else Linear(hidden_size, 1, bias=False, dtype=dtype, ops=ops)

    def forward(self, x: Tensor) -> Tensor:
        """x [num_tokens, hidden_size], normed -> the same shape."""
        result: Tensor = self.down_proj(self.gate_up_proj(x))
        return result if self.gate is None else result * sigmoid(self.gate(x)).to(result.dtype)

    @property
    def matrices(self) -> Shared | None:
        """What a kernel of all experts needs of it, where it is two dense products of this project's kernels alone."""
        gate_up, down = self.gate_up_proj, self.down_proj
        if type(gate_up.method) is not FusedLinear or type(down.method) is not FusedLinear:
            return None
        is_plain = self.gate is None and gate_up.bias is None and down.bias is None
        return Shared(gate_up.method.weight, down.method.weight) if is_plain else None

    def weights(self, layer: str) -> WeightSpecs:
        """layer: what stands before the names of its tensors."""
        name = f"{layer}{self.names.block}"
        parts = list(self.gate_up_proj.weights(f"{name}.gate_proj", f"{name}.up_proj"))
        yield from with_joined(f"{name}.{self.names.gate_up}", parts)
        yield from self.down_proj.weights(f"{name}.{self.names.down}")
        if self.gate is not None:
            yield from self.gate.weights(f"{layer}{self.gate_name}")
