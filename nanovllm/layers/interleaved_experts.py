"""Experts as gpt-oss's checkpoints lay them out: all in one tensor, gate and up in turn, and with biases.

Owns which of those numbers go where, for matrices as they are and for their biases. Invariant: what is held is what
`DenseExperts` holds: gates before ups, so that the operations need not know of the layout. Under tensor parallelism
rank 0 alone has the bias of the down projection, as the ranks' results are added up.

    mlp.experts.gate_up_proj       [num_experts, hidden, 2 * intermediate]    gate 0, up 0, gate 1, up 1, ...
    mlp.experts.gate_up_proj_bias  [num_experts, 2 * intermediate]
    mlp.experts.down_proj          [num_experts, intermediate, hidden]
    mlp.experts.down_proj_bias     [num_experts, hidden]
"""

import torch
from torch import Tensor, nn

from nanovllm.kernels.moe import Biases
from nanovllm.layers.experts import DenseExperts, ExpertNames, ExpertsSpec
from nanovllm.layers.weight_specs import WeightSpec, WeightSpecs


class ExpertBiases(nn.Module):
    """This rank's biases of a layer's experts."""

    def __init__(self, spec: ExpertsSpec) -> None:
        super().__init__()
        self.size = spec.intermediate_size
        self.held = spec.tp.part(self.size, "intermediate size of an expert")
        self.is_first = spec.tp.rank == 0
        shapes = (spec.num_experts, 2 * len(self.held)), (spec.num_experts, spec.hidden_size)
        self.gate_up, self.down = (
            nn.Parameter(torch.zeros(shape, dtype=spec.dtype), requires_grad=False) for shape in shapes
        )

    @property
    def both(self) -> Biases:
        return Biases(self.gate_up.data, self.down.data)

    def weights(self, block: str) -> WeightSpecs:
        num_experts, hidden_size = self.down.shape

        def fill_gate_up(tensor: Tensor) -> None:
            self.gate_up.copy_(torch.cat(in_turn(tensor, 1, self.held), dim=1))

        def fill_down(tensor: Tensor) -> None:
            if self.is_first:
                self.down.copy_(tensor[:])

        yield f"{block}.gate_up_proj_bias", WeightSpec((num_experts, 2 * self.size), fill_gate_up)
        yield f"{block}.down_proj_bias", WeightSpec((num_experts, hidden_size), fill_down)


def in_turn(tensor: Tensor, dim: int, held: range) -> tuple[Tensor, Tensor]:
    """Of rows that are a gate's and an up's in turn, along `dim`: those of the gates held, and of the ups."""
    pairs = tensor[(slice(None),) * dim + (slice(2 * held.start, 2 * held.stop),)].unflatten(dim, (-1, 2))
    return pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)


class InterleavedExperts(DenseExperts):
    def __init__(self, spec: ExpertsSpec) -> None:
        super().__init__(spec)
        self.of_biases = ExpertBiases(spec)

    @property
    def biases(self) -> Biases:
        return self.of_biases.both

    def weights(self, layer: str, names: ExpertNames) -> WeightSpecs:
        num_experts, hidden_size, part = self.down.shape
        block, size = f"{layer}{names.block}.experts", self.intermediate_size
        first, last = self.held.start, self.held.stop

        def fill_gate_up(tensor: Tensor) -> None:
            for half, rows in enumerate(in_turn(tensor, 2, self.held)):
                self.gate_up.data[:, half * part : (half + 1) * part].copy_(rows.transpose(1, 2))

        def fill_down(tensor: Tensor) -> None:
            self.down.copy_(tensor[:, first:last].transpose(1, 2))

        yield f"{block}.gate_up_proj", WeightSpec((num_experts, hidden_size, 2 * size), fill_gate_up)
        yield f"{block}.down_proj", WeightSpec((num_experts, size, hidden_size), fill_down)
        yield from self.of_biases.weights(block)
