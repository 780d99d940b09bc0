"""Sum, residual addition and norm in one kernel: ranks as in `test_all_reduce.py`."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from nanovllm.kernels.sum_norm import MAX_ROWS, SumNorm, few_rows, sum_norm_reference
from tests.kernels.ranks import Case, results_of_ranks
from tests.kernels.triton.test_all_reduce import part
from tests.kernels.twins import DEVICE, DTYPES, INTERPRETED, TOLERANCE, load_twin, relative_error, twin_test

load_twin("sum_norm")
pytestmark = twin_test

DIM, EPS = 24, 1e-6
# A few rows, which every rank adds up; more, of which each owns some; the memory of the first call again.
NUM_ROWS = (3, 20, 9, 8, 300) if not INTERPRETED else (3, 20, 9)


def as_rank(dtype: torch.dtype, rank: int, memories: Sequence[Tensor]) -> SumNorm:
    return SumNorm(rank, [memory.data_ptr() for memory in memories], DIM, dtype.itemsize, DEVICE, memories)


def inputs(dtype: torch.dtype, call: int) -> tuple[Tensor, Tensor]:
    residual, weight = part(7, call, (NUM_ROWS[call], DIM), dtype), part(8, call, (1, DIM), dtype)[0]
    return residual.to(DEVICE), weight.to(DEVICE)


def run(dtype: torch.dtype, sum_norm: SumNorm, rank: int, call: int) -> Sequence[Tensor]:
    x, (residual, weight) = part(rank, call, (NUM_ROWS[call], DIM), dtype).to(DEVICE), inputs(dtype, call)
    if not sum_norm.takes(x):
        return x, x
    return sum_norm(x, residual, weight, EPS, next_weight=weight)


@pytest.mark.parametrize(("size", "dtype"), [(3, torch.float16), *([] if INTERPRETED else [(2, d) for d in DTYPES])])
def test_equals_reference(size: int, dtype: torch.dtype) -> None:
    """On every rank; what is handed to the next call, in the rows that a rank adds up, to the bit."""
    num_bytes = SumNorm.memory_bytes(size, DIM, dtype.itemsize)
    (got,) = results_of_ranks([Case(size, num_bytes, partial(as_rank, dtype), partial(run, dtype), len(NUM_ROWS))])
    for call, num_rows in enumerate(NUM_ROWS):
        if num_rows > MAX_ROWS:
            continue
        residual, weight = (tensor.cpu() for tensor in inputs(dtype, call))
        parts = [part(rank, call, (num_rows, DIM), dtype) for rank in range(size)]
        normed, total = sum_norm_reference(parts, residual, weight, EPS)
        for rank, own in enumerate(got):
            assert relative_error(own[call][0], normed) < TOLERANCE[dtype]
            assert torch.equal(own[call][0], got[0][call][0]), "all ranks have the same bits"
            rows = slice(None) if num_rows <= few_rows(size) else slice(rank, None, size)
            assert torch.equal(own[call][1][rows], total[rows])


def test_takes_what_it_can_do() -> None:
    memory = [torch.zeros(SumNorm.memory_bytes(2, DIM, 2), dtype=torch.uint8, device=DEVICE)] * 2
    sum_norm = as_rank(torch.float16, 0, memory)
    x = torch.zeros(MAX_ROWS + 1, DIM, dtype=torch.float16, device=DEVICE)
    assert sum_norm.takes(x[:1])
    assert sum_norm.takes(x[:MAX_ROWS])
    for other in (x, x[:0], x[:4, :16], x[:, :16], x[:4].float(), x[:4].short()):
        assert not sum_norm.takes(other)
