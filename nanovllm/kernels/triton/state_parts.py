"""Parts of the kernels of layers with a state: the part of a step that is a request's, and what several compute alike.

Owns no kernel. Invariant: a state goes to the snapshot of a token only if that token has one.
"""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """Beyond 20, where float32 tells no difference, it is x itself."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def part_of_step(request, rows_ptr, starts_ptr):
    """Of a request its slot, its first token in the step, and how many it has there."""
    slot = tl.load(rows_ptr + request).to(tl.int64)
    start = tl.load(starts_ptr + request)
    return slot, start, tl.load(starts_ptr + request + 1) - start


@triton.jit
def keep_matrix(matrix, matrices_ptr, slot_stride, cell, is_cell, snapshot_ptr):
    """Copy it into a token's snapshot, if there is one to fill."""
    snapshot = tl.load(snapshot_ptr).to(tl.int64)
    if snapshot >= 0:
        tl.store(matrices_ptr + snapshot * slot_stride + cell, matrix, mask=is_cell)
