"""Dispatch of an operation: to its Triton twin or to its PyTorch reference.

Owns that one decision; loads neither. Invariant: the answer depends on the tensor alone, never on the environment.
"""

import torch


def use_triton(x: torch.Tensor) -> bool:
    """True if `x` lives on a GPU, so that the Triton twin of an operation applies."""
    return x.is_cuda
