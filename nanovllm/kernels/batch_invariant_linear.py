"""Batch-invariant linear: a row's product is the same to the bit in any batch; for `deterministic=True`.

Owns the tile. Invariant: a row's result depends on that row and the weight, not on the other rows, nor on how many
there are. Matrix libraries choose another order of additions for another number of rows, so products here always have
the same number of them: on a CPU, ROWS at a time through the library; on a GPU, by kernels that add the inner dimension
up in an order that the weight alone determines (`triton/batch_invariant/linear.py`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.silu_and_mul import GATES

ROWS = 8  # what a decode of one request pays for; more would suit prompts better


def batch_invariant_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, semaphores: Tensor | None = None
) -> Tensor:
    """x W^T + b. x [num_rows, in_features], weight [out_features, in_features] -> [num_rows, out_features].

    semaphores: see `skinny_linear.skinny_linear`.
    """
    if use_triton(x):
        from nanovllm.kernels.triton.batch_invariant.linear import batch_invariant_linear_triton

        return batch_invariant_linear_triton(x, weight, bias, semaphores)
    return in_row_tiles(lambda tile: F.linear(tile, weight, bias), x)


def batch_invariant_gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "silu",
    semaphores: Tensor | None = None,
) -> Tensor:
    """`skinny_linear.gated_linear` of that product, and the same bits as the product and the gate one by one."""
    if use_triton(x):
        from nanovllm.kernels.triton.batch_invariant.linear import batch_invariant_linear_triton, is_skinny

        if is_skinny(x, weight):
            return batch_invariant_linear_triton(x, weight, bias, semaphores, activation)
    return GATES[activation](batch_invariant_linear(x, weight, bias, semaphores))


def in_row_tiles(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """product(x), ROWS rows at a time; what is missing in the last tile is zeros. x [num_rows > 0, in_features]."""
    num_rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -num_rows % ROWS)).contiguous()
    parts = [product(tile) for tile in padded.split(ROWS)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:num_rows]


def one_row_at_a_time(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), row by row: on a CPU, the last numbers of a tensor are computed in another way."""
    return torch.cat([function(*rows) for rows in zip(*(tensor.split(1) for tensor in tensors), strict=True)])
