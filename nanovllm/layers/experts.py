"""A mixture of experts in the place of an MLP (Shazeer et al., 2017; Fedus et al., 2021): router and expert weights.

Owns the stacked weights and how a checkpoint's tensors map to them; the computation is `kernels/moe.py`. Under tensor
parallelism every rank holds all experts, each split along its intermediate size like an MLP, and the router whole.
Invariant: no token is dropped, whatever the router chooses.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe import fused_topk
from nanovllm.kernels.ops import Ops
from nanovllm.layers.linear import Linear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.slots import Slots, WeightSlot, parameter_slot


class ExpertNames(NamedTuple):
    """What a family's checkpoints call the block in a layer, and the gate, up and down projection of an expert."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Experts(nn.Module):
    """Each token goes through `top_k` of `num_experts` gated feed-forward layers, weighted by the router.

    renormalize: the weights of a token's experts sum to one.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        renormalize: bool,
        names: ExpertNames,
        dtype: torch.dtype,
        tp: TensorParallel,
        ops: Ops,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.renormalize = renormalize
        self.names = names
        self.tp = tp
        self.ops = ops
        part = tp.shard(intermediate_size, "intermediate size of an expert")
        self.router = Linear(hidden_size, num_experts, bias=False, dtype=dtype, ops=ops)
        shapes = (num_experts, 2 * part, hidden_size), (num_experts, hidden_size, part)
        self.gate_up, self.down = (
            nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False) for shape in shapes
        )

    def forward(self, norm: RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(experts of the norm of x + residual, x + residual), both [num_tokens, hidden_size]."""
        normed, total = norm(x, residual)
        weights, expert_ids = fused_topk(self.router(normed), self.top_k, self.renormalize)
        return self.tp.all_reduce(self.ops.fused_experts(normed, self.gate_up, self.down, weights, expert_ids)), total

    def slots(self, name: str) -> Slots:
        """One tensor per expert and projection, as on the Hub, or all experts in one, as transformers 5 keeps them."""
        fused_name, name = name, name.removesuffix("mlp") + self.names.block
        num_experts, hidden_size, part = self.down.shape
        size, first, last = part * self.tp.size, part * self.tp.rank, part * (self.tp.rank + 1)
        router = parameter_slot(f"{name}.gate.weight", self.router.weight)
        yield router
        gate_names, up_names, down_names = (
            [f"{name}.experts.{expert}.{projection}.weight" for expert in range(num_experts)]
            for projection in self.names[1:]
        )
        gate, up, down = self.gate_up.data[:, :part], self.gate_up.data[:, part:], self.down.data

        def rows(target: Tensor) -> WeightSlot:
            return WeightSlot((size, hidden_size), lambda tensor: target.copy_(tensor[first:last]))

        def columns(target: Tensor) -> WeightSlot:
            return WeightSlot((hidden_size, size), lambda tensor: target.copy_(tensor[:, first:last]))

        for expert in range(num_experts):
            yield gate_names[expert], rows(gate[expert])
            yield up_names[expert], rows(up[expert])
            yield down_names[expert], columns(down[expert])

        def fill_gate_up(tensor: Tensor) -> None:
            gate.copy_(tensor[:, first:last])
            up.copy_(tensor[:, size + first : size + last])

        def fill_down(tensor: Tensor) -> None:
            down.copy_(tensor[:, :, first:last])

        fused = f"{fused_name}.experts"
        shapes = (num_experts, 2 * size, hidden_size), (num_experts, hidden_size, size)
        yield f"{fused}.gate_up_proj", WeightSlot(shapes[0], fill_gate_up, instead_of=(*gate_names, *up_names))
        yield f"{fused}.down_proj", WeightSlot(shapes[1], fill_down, instead_of=tuple(down_names))
        if fused_name != name:
            yield f"{fused_name}.gate.weight", router[1]._replace(instead_of=(router[0],))
