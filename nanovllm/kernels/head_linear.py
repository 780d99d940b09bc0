"""A product for each head: its numbers of a token times a matrix of its own.

Owns the meaning. On a GPU it is one kernel for any number of tokens, which waits for nothing and whose rows do not know
of each other. Invariant: pure, but for `out`.
"""

import torch
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton


def head_linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [num_tokens, num_heads, inputs], weight [num_heads, inputs, outputs] -> [num_tokens, num_heads, outputs].

    out: where to write it. Rows of x and out have contiguous numbers; other strides are free.
    """
    if use_triton(x):
        from nanovllm.kernels.triton.linear.head_linear import head_linear_triton

        return head_linear_triton(x, weight, out)
    product = torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)
    return product if out is None else out.copy_(product)
