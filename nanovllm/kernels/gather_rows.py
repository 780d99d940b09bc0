"""Gather of rows by index (embedding lookup): embeddings of tokens, angles of positions, hidden states to score.

Owns the meaning, PyTorch's index_select; the GPU has a kernel of its own for it so that dependent launch reaches from
the preparation of a step through to its first layer. Invariant: pure; the bits are the table's.
"""

from torch import Tensor

from nanovllm.kernels.dispatch import use_triton


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """table [n, width], index [m] integers from 0 to n - 1, which a GPU does not check -> [m, width], new."""
    if use_triton(table):
        from nanovllm.kernels.triton.gather_rows import gather_rows_triton

        return gather_rows_triton(table, index)
    return gather_rows_reference(table, index)


def gather_rows_reference(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index)
