"""The gate of a feed-forward layer (Shazeer, 2020): silu(gate) * up, or gelu(gate) * up with the tanh form of GELU.

Owns the meaning and its rounding: the activation is rounded to the input's dtype before the product, as in Hugging
Face's models.
Invariant: pure; the two halves lie side by side in the last dimension, gate first.
"""

import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up [num_tokens, 2 * intermediate] -> [num_tokens, intermediate], new, of the same dtype."""
    if use_triton(gate_up):
        from nanovllm.kernels.triton.silu_and_mul import silu_and_mul_triton

        return silu_and_mul_triton(gate_up)
    return silu_and_mul_reference(gate_up)


def gelu_and_mul(gate_up: Tensor) -> Tensor:
    """As `silu_and_mul`, with gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) of the gate."""
    if use_triton(gate_up):
        from nanovllm.kernels.triton.silu_and_mul import silu_and_mul_triton

        return silu_and_mul_triton(gate_up, gelu=True)
    return gelu_and_mul_reference(gate_up)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_and_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


# By the names that layers have for an activation.
GATES = {"silu": silu_and_mul, "gelu_tanh": gelu_and_mul}
REFERENCE_GATES = {"silu": silu_and_mul_reference, "gelu_tanh": gelu_and_mul_reference}
