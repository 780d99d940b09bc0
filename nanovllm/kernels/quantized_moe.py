"""Mixture of experts with weights in 4 or 8 bits: `moe.fused_experts` over stacks of codes.

Owns how a stack is cut into experts; what codes mean is `quantized_linear.py`'s, what is done with them `moe.py`'s.
Invariant: no dense copy of an expert outlives its product.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.moe import SILU, Biases, Gate, fused_experts, fused_experts_reference
from nanovllm.kernels.quantized_linear import QuantizedWeight, dequantize, quantized_linear

Rounded = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stack:
    """The matrices of all experts, one below the other: [num_experts * outputs, inputs]."""

    weight: QuantizedWeight
    num_experts: int

    def __getitem__(self, expert: int) -> QuantizedWeight:
        codes, scale, zero, group_size, low = self.weight
        size = len(codes) // self.num_experts
        rows = slice(expert * size, (expert + 1) * size)
        zero, low = (None if of_groups is None else of_groups[rows] for of_groups in (zero, low))
        return QuantizedWeight(codes[rows], scale[rows], zero, group_size, low)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[num_experts, outputs, inputs]."""
        return dequantize(self.weight, dtype).unflatten(0, (self.num_experts, -1))


def quantized_experts(
    x: Tensor,
    gate_up: Stack,
    down: Stack,
    weights: Tensor,
    expert_ids: Tensor,
    rounded: Rounded | None = None,
    biases: Biases | None = None,
    gate: Gate = SILU,
) -> Tensor:
    """See `moe.fused_experts`. rounded: what a format does with the inputs of each product first.

    On a GPU, what its kernel for codes does not take, and many rows for each expert, get a dense copy of both stacks.
    """
    if use_triton(x):
        from nanovllm.kernels.triton.quantized_moe import quantized_experts_triton, takes

        if takes(x, gate_up, down, expert_ids):
            return quantized_experts_triton(x, gate_up, down, weights, expert_ids, rounded, biases, gate)
        if rounded is None:
            dense = gate_up.dense(x.dtype), down.dense(x.dtype)
            return fused_experts(x, *dense, weights, expert_ids, biases, gate)

    def linear(rows: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        return quantized_linear(rows if rounded is None else rounded(rows), weight, bias)

    return fused_experts_reference(x, gate_up, down, weights, expert_ids, biases, gate, linear)
