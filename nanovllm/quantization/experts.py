"""QuantizedExperts: the experts of a layer as two stacks of quantized matrices.

Owns the choice for a layer's experts, and how their tensors stack. A stack is a `QuantizedLinear` whose matrices are
those of all experts, one below the other, so formats need not know of experts. Invariant: all experts of a layer are
held alike; where they are not, the layer is refused by name.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from nanovllm.kernels.quantized_linear import round_rows
from nanovllm.kernels.quantized_moe import Stack, quantized_experts
from nanovllm.layers.experts import ExpertNames, ExpertsSpec, dense_experts
from nanovllm.layers.interleaved_experts import ExpertBiases
from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.weight_specs import WeightSpecs
from nanovllm.quantization.mxfp4 import Mxfp4Linear
from nanovllm.quantization.quantized_linear import QuantizedLinear
from nanovllm.quantization.scheme import MakeLinear, Scheme


def experts_by(scheme: Scheme, spec: ExpertsSpec, layer: str, names: ExpertNames) -> Any:
    """How the experts of a layer are held. Raises NotImplementedError for those that cannot be held yet."""
    of_expert = [f"{layer}{names.block}.experts.{expert}" for expert in range(spec.num_experts)]
    gate_up = [f"{expert}.{projection}" for expert in of_expert for projection in (names.gate, names.up)]
    down = [f"{expert}.{names.down}" for expert in of_expert]
    makes = {scheme.method_of(name) for name in (*gate_up, *down)}
    if makes == {None}:
        return dense_experts(spec)
    make = makes.pop()
    if makes or make is None:
        raise NotImplementedError(f"{layer}{names.block}.experts: experts in different forms are not supported")
    if spec.gate.num_parts == 1:
        raise NotImplementedError(f"{layer}{names.block}.experts: experts without a gate are held as they are only")
    if spec.is_interleaved and make is not Mxfp4Linear:
        raise NotImplementedError(
            f"{layer}{names.block}.experts: with biases, experts are held as they are, or in MXFP4"
        )
    return QuantizedExperts(spec, make, gate_up, down)


class QuantizedExperts(nn.Module):
    def __init__(self, spec: ExpertsSpec, make: MakeLinear, gate_up: list[str], down: list[str]) -> None:
        """gate_up, down: names of the matrices in the checkpoint; of each expert gate, then up."""
        super().__init__()
        hidden, size = spec.hidden_size, spec.intermediate_size
        held = spec.tp.part(size, "intermediate size of an expert")
        self.num_experts = spec.num_experts
        whole = range(hidden)

        def stacked(names: list[str], rows: int, parts: range, columns: int, inputs: range) -> QuantizedLinear:
            sizes, held_rows = (rows,) * len(names), (parts,) * len(names)
            stack = make(LinearSpec(sizes, held_rows, columns, inputs, spec.dtype, tuple(names)))
            if not isinstance(stack, QuantizedLinear) or (stack.rounding is not None and stack.rounding.is_static):
                raise NotImplementedError(f"{names[0]}: experts in this form, or with static scales of their inputs")
            return stack

        self.gate_up: QuantizedLinear = stacked(gate_up, size, held, hidden, whole)
        self.down: QuantizedLinear = stacked(down, hidden, whole, size, held)
        rounding = self.gate_up.rounding
        self._rounded = None
        if rounding is not None:
            self._rounded = partial(round_rows, kind=rounding.kind, group_size=rounding.group_size)
        self.gate, self.of_biases = spec.gate, ExpertBiases(spec) if spec.is_interleaved else None

    def mix(self, x: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """See `kernels.moe.fused_experts`."""
        gate_up, down = (Stack(stack.weight, self.num_experts) for stack in (self.gate_up, self.down))
        biases = None if self.of_biases is None else self.of_biases.both
        return quantized_experts(x, gate_up, down, weights, expert_ids, self._rounded, biases, self.gate)

    def weights(self, layer: str, names: ExpertNames) -> WeightSpecs:
        if self.of_biases is not None:
            block = f"{layer}{names.block}.experts"
            for projection, stack in (("gate_up_proj", self.gate_up), ("down_proj", self.down)):
                assert isinstance(stack, Mxfp4Linear)
                yield from stack.stacked(f"{block}.{projection}", self.num_experts)
            yield from self.of_biases.weights(block)
            return
        for stack in (self.gate_up, self.down):
            for part, name in enumerate(stack.spec.names):
                for tensor, spec in stack.weights(part):
                    yield f"{name}.{tensor}", spec._replace(layer=stack)

    def finish(self) -> None:
        for stack in (self.gate_up, self.down):
            stack.finish()
            if stack.order is not None:
                raise NotImplementedError(
                    f"{stack.spec.names[0]}: experts with groups of inputs in another order (desc_act, actorder)"
                )
