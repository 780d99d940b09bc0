"""A mixture of experts in the place of an MLP (Shazeer et al., 2017; Fedus et al., 2021): router and expert weights.

Owns the stacked weights and how a checkpoint's tensors map to them; the computation is `kernels/moe.py`. Under tensor
parallelism every rank holds all experts, each split along its intermediate size like an MLP, and the router whole.
Invariant: no token is dropped, whatever the router chooses.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe import fused_topk
from nanovllm.layers.linear import Linear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.slots import Slots, WeightSlot


class ExpertNames(NamedTuple):
    """What a family's checkpoints call the block in a layer, and the gate, up and down projection of an expert."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class DenseExperts(nn.Module):
    """How a rank holds its part of all experts and multiplies by it: two stacks of matrices, in the model's dtype."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        tp: TensorParallel,
        fused_experts: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        self.held = tp.part(intermediate_size, "intermediate size of an expert")
        self.intermediate_size = intermediate_size
        self.fused_experts = fused_experts
        part = len(self.held)
        shapes = (num_experts, 2 * part, hidden_size), (num_experts, hidden_size, part)
        self.gate_up, self.down = (
            nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False) for shape in shapes
        )

    def mix(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """See `kernels.moe.fused_experts`."""
        return self.fused_experts(x, self.gate_up, self.down, weights, expert_ids)

    def slots(self, name: str, names: ExpertNames, fused_name: str) -> Slots:
        """One tensor per expert and projection below `name`, or all experts in one below `fused_name`."""
        num_experts, hidden_size, part = self.down.shape
        size, first, last = self.intermediate_size, self.held.start, self.held.stop
        gate_names, up_names, down_names = (
            [f"{name}.{expert}.{projection}.weight" for expert in range(num_experts)] for projection in names[1:]
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

        shapes = (num_experts, 2 * size, hidden_size), (num_experts, hidden_size, size)
        yield f"{fused_name}.gate_up_proj", WeightSlot(shapes[0], fill_gate_up, instead_of=(*gate_names, *up_names))
        yield f"{fused_name}.down_proj", WeightSlot(shapes[1], fill_down, instead_of=tuple(down_names))


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
        self.num_experts = num_experts
        self.top_k = top_k
        self.renormalize = renormalize
        self.names = names
        self.tp = tp
        self.router = Linear(hidden_size, num_experts, bias=False, dtype=dtype, ops=ops)
        self.method = DenseExperts(num_experts, hidden_size, intermediate_size, dtype, tp, ops.fused_experts)

    def forward(self, norm: RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(experts of the norm of x + residual, x + residual), both [num_tokens, hidden_size]."""
        normed, total = norm(x, residual)
        weights, expert_ids = fused_topk(self.router(normed), self.top_k, self.renormalize)
        return self.tp.all_reduce(self.method.mix(normed, weights, expert_ids)), total

    def slots(self, name: str) -> Slots:
        """One tensor per expert and projection, as on the Hub, or all experts in one, as transformers 5 keeps them."""
        fused_name, name = name, name.removesuffix("mlp") + self.names.block
        router = list(self.router.slots(f"{name}.gate"))
        yield from router
        yield from self.method.slots(f"{name}.experts", self.names, f"{fused_name}.experts")
        if fused_name != name:
            for router_name, slot in router:
                suffix = router_name.removeprefix(name)
                yield f"{fused_name}{suffix}", slot._replace(instead_of=(router_name,))
