"""Mixture-of-experts layer in the place of an MLP (Shazeer et al., 2017; Fedus et al., 2021): router and experts.

Owns the stacked weights and how a checkpoint's tensors map to them; the computation is `kernels/routing.py` and
`kernels/moe.py`. Under tensor parallelism every rank holds all experts, each split along its intermediate size like an
MLP, and the router whole. Invariant: no token is dropped, whatever the router chooses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.kernels.moe import SILU, Biases, Gate, Shared
from nanovllm.kernels.router import Router, rms_norm_route
from nanovllm.kernels.routing import Routing, route
from nanovllm.layers.fused_linear import FusedLinear
from nanovllm.layers.linear import Linear
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import Ops
from nanovllm.layers.shared_expert import SharedExpert
from nanovllm.layers.weight_specs import WeightSpec, WeightSpecs


class StackedNames(NamedTuple):
    """The tensors of a layer where all experts stand in one, seen from the layer; the defaults are transformers 5's."""

    gate_up: str = "mlp.experts.gate_up_proj"
    down: str = "mlp.experts.down_proj"
    router: str = "mlp.gate.weight"
    bias: str = "mlp.gate.e_score_correction_bias"


class ExpertNames(NamedTuple):
    """What a family's checkpoints call the block in a layer, and in it the gate, up and down projection of an expert.

    router, bias: of the choice among experts. bias_is_row: of shape [1, num_experts]. stacked: the names of checkpoints
    that hold all experts in one tensor.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"
    bias: str = "gate.e_score_correction_bias"
    bias_is_row: bool = False
    stacked: tuple[StackedNames, ...] = (StackedNames(),)


class ExpertsSpec(NamedTuple):
    """The experts of a layer, of which each rank holds a part. fused_experts: the operation (`kernels/moe.py`).

    is_interleaved: checkpoints hold all experts in one tensor, a gate's row before that of its up, and have biases
    (`layers/interleaved_experts.py`).
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    tp: TensorParallel
    fused_experts: Callable[..., Tensor]
    gate: Gate = SILU
    is_interleaved: bool = False


class DenseExperts(nn.Module):
    """How a rank holds its part of all experts and multiplies by it: two stacks of matrices, in the model's dtype."""

    def __init__(self, spec: ExpertsSpec) -> None:
        super().__init__()
        self.held = spec.tp.part(spec.intermediate_size, "intermediate size of an expert")
        self.intermediate_size = spec.intermediate_size
        self.fused_experts, self.gate = spec.fused_experts, spec.gate
        part = len(self.held)
        rows = spec.gate.num_parts * part
        shapes = (spec.num_experts, rows, spec.hidden_size), (spec.num_experts, spec.hidden_size, part)
        self.gate_up, self.down = (
            nn.Parameter(torch.empty(shape, dtype=spec.dtype), requires_grad=False) for shape in shapes
        )

    @property
    def biases(self) -> Biases | None:
        return None

    def finish(self) -> None:
        """Called when the weights are in place."""

    def mix(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """See `kernels.moe.fused_experts`."""
        return self.fused_experts(x, self.gate_up, self.down, weights, expert_ids, self.biases, self.gate)

    def mix_with(self, shared: Shared, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """The same, and what `shared` adds."""
        experts = self.gate_up, self.down, weights, expert_ids, self.biases, self.gate
        return self.fused_experts(x, *experts, shared=shared)

    def weights(self, layer: str, names: ExpertNames) -> WeightSpecs:
        """One tensor per expert and projection, or all experts in one. layer: what stands before their names."""
        num_experts, hidden_size, part = self.down.shape
        size, first, last = self.intermediate_size, self.held.start, self.held.stop
        gate_names, up_names, down_names = (
            [f"{layer}{names.block}.experts.{expert}.{projection}.weight" for expert in range(num_experts)]
            for projection in (names.gate, names.up, names.down)
        )
        gate, up, down = self.gate_up.data[:, :part], self.gate_up.data[:, part:], self.down.data
        for expert in range(num_experts):
            yield gate_names[expert], self.rows(gate[expert])
            yield up_names[expert], self.rows(up[expert])
            yield down_names[expert], self.columns(down[expert])

        def fill_gate_up(tensor: Tensor) -> None:
            gate.copy_(tensor[:, first:last])
            up.copy_(tensor[:, size + first : size + last])

        def fill_down(tensor: Tensor) -> None:
            down.copy_(tensor[:, :, first:last])

        shapes = (num_experts, 2 * size, hidden_size), (num_experts, hidden_size, size)
        for stacked in names.stacked:
            both = WeightSpec(shapes[0], fill_gate_up, instead_of=(*gate_names, *up_names))
            yield f"{layer}{stacked.gate_up}", both
            yield f"{layer}{stacked.down}", WeightSpec(shapes[1], fill_down, instead_of=tuple(down_names))

    def rows(self, target: Tensor) -> WeightSpec:
        """Of a matrix [intermediate, hidden] of one expert, those that are held: target."""
        held, place = slice(self.held.start, self.held.stop), self._place(target)
        shape = self.intermediate_size, target.shape[1]
        return WeightSpec(shape, lambda tensor: target.copy_(tensor[held]), place=place)

    def columns(self, target: Tensor) -> WeightSpec:
        """Of a matrix [hidden, intermediate]."""
        held, place = slice(self.held.start, self.held.stop), self._place(target)
        shape = target.shape[0], self.intermediate_size
        return WeightSpec(shape, lambda tensor: target.copy_(tensor[:, held]), place=place)

    def _place(self, target: Tensor) -> Tensor | None:
        return target if len(self.held) == self.intermediate_size else None


def dense_experts(spec: ExpertsSpec) -> DenseExperts:
    if spec.is_interleaved:
        from nanovllm.layers.interleaved_experts import InterleavedExperts

        return InterleavedExperts(spec)
    if spec.gate.num_parts == 1:
        from nanovllm.layers.ungated_experts import UngatedExperts

        return UngatedExperts(spec)
    return DenseExperts(spec)


class Experts(nn.Module):
    """Each token goes through some of `num_experts` gated feed-forward layers, weighted by the router.

    shared: what every token goes through beside them, called and loaded as SharedExpert. gate, is_interleaved: as in
    ExpertsSpec; the router of interleaved experts has a bias, too.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        routing: Routing,
        names: ExpertNames,
        dtype: torch.dtype,
        tp: TensorParallel,
        ops: Ops,
        shared: Any = None,
        gate: Gate = SILU,
        is_interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.routing = routing
        self.names = names
        self.tp = tp
        # A bias is trained in float32, to decide between scores that are near to each other.
        self.router_dtype = torch.float32 if routing.has_bias else dtype
        self.router = Linear(hidden_size, num_experts, bias=is_interleaved, dtype=self.router_dtype, ops=ops)
        self.bias: nn.Parameter | None = None
        if routing.has_bias:
            self.bias = nn.Parameter(torch.empty(num_experts, dtype=torch.float32), requires_grad=False)
        self.spec = ExpertsSpec(
            num_experts, hidden_size, intermediate_size, dtype, tp, ops.fused_experts, gate, is_interleaved
        )
        self.make_method = ops.experts_method or (lambda spec, layer, names: dense_experts(spec))
        self.method: Any = None  # made when its weights' names are known
        self.shared = shared

    def forward(self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(experts of the norm of x + residual, x + residual), both [num_tokens, hidden_size]."""
        normed, total, *choice = self._choose(norm, x, residual)
        shared = self._shared_in_one if len(x) == 1 else None
        if shared is not None:
            mixed = self.method.mix_with(shared, normed, *choice)
        else:
            mixed = self.method.mix(normed, *choice)
            if self.shared is not None:
                mixed = mixed + self.shared(normed)
        return self.tp.all_reduce(mixed), total

    def _choose(
        self, norm: RMSNorm | NoNorm, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(norm of x + residual, x + residual, weights, expert_ids)"""
        method = self.router.method
        if type(method) is FusedLinear and norm.weight is not None and residual is not None:
            router = Router(method.weight, self.router.bias, self.bias, self.routing)
            return rms_norm_route(x, residual, norm.weight, norm.eps, router, method.semaphores)
        normed, total = norm(x, residual)
        return normed, total, *route(self.router(normed.to(self.router_dtype)), self.bias, self.routing)

    def finish(self) -> None:
        self.method.finish()

    @property
    def _shared_in_one(self) -> Shared | None:
        """The matrices of the shared expert, where a kernel of a single token's experts takes it along."""
        takes_it = (
            isinstance(self.shared, SharedExpert) and type(self.method) is DenseExperts and self.spec.gate == SILU
        )
        return self.shared.matrices if takes_it else None

    def weights(self, name: str) -> WeightSpecs:
        """One tensor per expert and projection, as on the Hub, or all experts in one, as transformers 5 keeps them."""
        layer, names = name.removesuffix("mlp"), self.names
        if self.method is None:
            self.method = self.make_method(self.spec, layer, names)
        chosen_by = dict(self.router.weights(f"{layer}{names.block}.{names.router}"))
        if self.bias is not None:
            chosen_by[f"{layer}{names.block}.{names.bias}"] = _bias_spec(self.bias.data, names.bias_is_row)
        yield from chosen_by.items()
        yield from self.method.weights(layer, names)
        for stacked in names.stacked:
            for other, (own, spec) in zip((stacked.router, stacked.bias), chosen_by.items(), strict=False):
                if f"{layer}{other}" != own:
                    yield f"{layer}{other}", spec._replace(instead_of=(own,))
        if self.shared is not None:
            yield from self.shared.weights(layer)


def _bias_spec(bias: Tensor, is_row: bool) -> WeightSpec:
    return WeightSpec((1, *bias.shape) if is_row else tuple(bias.shape), lambda tensor: bias.copy_(tensor.view(-1)))
