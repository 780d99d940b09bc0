"""Low-rank adapters (LoRA, Hu et al., 2021): y += B (A x) + b, where each row of a step has its own adapter, or none.

Owns the meaning of the two products and which rows share an adapter. Adapters lie in numbered slots, stacked; a row
says which slot is its. Invariant: a row without an adapter is read by nobody and keeps its bits; what a row gets does
not depend on the others; all sizes follow from those of the arguments, so a step can be captured as a CUDA graph.

    shrink    x [rows, inputs] -> A x, of all matrices of a layer side by side, their ranks padded to one
    expand    outputs += B (A x) + b, each matrix of the layer from its own part of A x; then the layer's gate, if any
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.kernels.dispatch import use_triton
from nanovllm.kernels.moe import align
from nanovllm.kernels.silu_and_mul import GATES
from nanovllm.kernels.skinny_linear import skinny_linear

Linear = Callable[[Tensor, Tensor], Tensor]
MAX_SINGLE_ROWS = 8  # of so few rows, each is a block of its own


class AdapterRows(NamedTuple):
    """Which slot each row of a product takes. slots [num_rows] int32; num_slots stands for no adapter.

    On a GPU: rows, block_slots as `moe.align` makes them of slots, "no adapter" being one more; rows None: block i is
    row i alone, and block_slots are the slots. is_fixed: sums have an order that the number of rows does not change.
    semaphores: room for counters (`skinny_gemm.new_semaphores`), of products that run one after the other.
    On a CPU: members, (slot, its rows) for each slot in use.
    """

    slots: Tensor
    num_slots: int
    rows: Tensor | None = None
    block_slots: Tensor | None = None
    is_fixed: bool = False
    semaphores: Tensor | None = None
    members: Sequence[tuple[int, Tensor]] = ()


def adapter_rows(
    slots: Tensor, num_slots: int, is_fixed: bool = False, semaphores: Tensor | None = None
) -> AdapterRows:
    """slots, is_fixed, semaphores: as in AdapterRows."""
    if not use_triton(slots):
        return by_slot(slots, num_slots)
    num_rows = slots.shape[0]
    if num_rows <= MAX_SINGLE_ROWS and not is_fixed:
        return AdapterRows(slots, num_slots, None, slots, is_fixed)
    block_size = 16 if is_fixed or num_rows <= 512 else 64
    rows, block_slots = align(slots, num_slots + 1, block_size)
    return AdapterRows(slots, num_slots, rows, block_slots, is_fixed, semaphores)


def by_slot(slots: Tensor, num_slots: int) -> AdapterRows:
    used = [slot for slot in slots.unique().tolist() if slot < num_slots]
    members = [(slot, (slots == slot).nonzero()[:, 0]) for slot in used]
    return AdapterRows(slots, num_slots, members=members)


def shrink(x: Tensor, a: Tensor, rows: AdapterRows, linear: Linear = F.linear) -> Tensor:
    """x [num_rows, inputs], a [num_slots, ranks, inputs] -> [splits, num_rows, ranks] float32, whose sum over the first
    dimension is A x; what it holds for rows without an adapter means nothing. linear: the product, in another form.
    """
    if use_triton(x):
        from nanovllm.kernels.triton.lora import shrink_triton

        return shrink_triton(x, a, rows)
    return shrink_reference(x, a, rows, linear)


def linear_and_shrink(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, rows: AdapterRows, semaphores: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(skinny_linear(x, weight, bias, semaphores), shrink(x, a, rows)): of one row, in one kernel."""
    if use_triton(x) and x.shape[0] == 1 and rows.rows is None:
        from nanovllm.kernels.triton.linear.skinny_gemv import GemvConfig
        from nanovllm.kernels.triton.linear.skinny_linear import choose
        from nanovllm.kernels.triton.lora import linear_and_shrink_triton

        config = choose(x, weight)
        if isinstance(config, GemvConfig):
            return linear_and_shrink_triton(x, weight, bias, a, rows, config)
    shrunk = shrink(x, a, rows)
    return skinny_linear(x, weight, bias, semaphores), shrunk


def expand(
    outputs: Tensor,
    shrunk: Tensor,
    b: Tensor,
    bias: Tensor,
    sizes: Sequence[int],
    rows: AdapterRows,
    activation: str | None = None,
    linear: Linear = F.linear,
) -> Tensor:
    """outputs [num_rows, sum of sizes], which are overwritten, with B (A x) + b added; gated by activation if given.

    shrunk: as from `shrink`, a part of equal rank for each of `sizes`. b [num_slots, sum of sizes, rank], bias
    [num_slots, sum of sizes].
    """
    if use_triton(outputs):
        from nanovllm.kernels.triton.lora import expand_triton

        return expand_triton(outputs, shrunk, b, bias, sizes, rows, activation)
    return expand_reference(outputs, shrunk, b, bias, sizes, rows, activation, linear)


def shrink_reference(x: Tensor, a: Tensor, rows: AdapterRows, linear: Linear = F.linear) -> Tensor:
    shrunk = torch.zeros((1, x.shape[0], a.shape[1]), dtype=torch.float32, device=x.device)
    for slot, index in rows.members:
        shrunk[0, index] = linear(x[index], a[slot]).float()
    return shrunk


def expand_reference(
    outputs: Tensor,
    shrunk: Tensor,
    b: Tensor,
    bias: Tensor,
    sizes: Sequence[int],
    rows: AdapterRows,
    activation: str | None = None,
    linear: Linear = F.linear,
) -> Tensor:
    rank, summed = b.shape[2], shrunk.sum(0)
    for slot, index in rows.members:
        parts = summed[index].to(b.dtype).split(rank, dim=1)
        added = [linear(part, matrix) for part, matrix in zip(parts, b[slot].split(list(sizes)), strict=True)]
        outputs[index] += torch.cat(added, dim=1) + bias[slot]
    return outputs if activation is None else GATES[activation](outputs)
