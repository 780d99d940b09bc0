"""All-gather in place: ranks as in `test_all_reduce.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm.kernels.all_gather import InPlaceAllGather, all_gather_reference
from tests.kernels.ranks import Case, results_of_ranks
from tests.kernels.triton.test_all_reduce import part
from tests.kernels.twins import DEVICE, load_twin, twin_test

load_twin("all_gather")
pytestmark = twin_test

COLUMNS, WIDTH, HALF_BYTES = 24, 40, 2048  # of two ranks; the last 8 columns of the second are padding
NUM_ROWS = (3, 20, 1)


def as_rank(rank: int, memories: Sequence[Tensor]) -> InPlaceAllGather:
    return InPlaceAllGather(rank, [memory.data_ptr() for memory in memories], memories[rank], memories)


def gather(all_gather: InPlaceAllGather, rank: int, call: int) -> Sequence[Tensor]:
    x = part(rank, call, (NUM_ROWS[call], COLUMNS), torch.float16).to(DEVICE)
    assert all_gather.takes(x, WIDTH)
    return [all_gather(x, WIDTH).clone()]


def test_equals_reference() -> None:
    """On both ranks, in calls of different sizes that follow each other at once."""
    num_bytes = InPlaceAllGather.memory_bytes(2, HALF_BYTES)
    (got,) = results_of_ranks([Case(2, num_bytes, as_rank, gather, len(NUM_ROWS))])
    for call, num_rows in enumerate(NUM_ROWS):
        parts = [part(rank, call, (num_rows, COLUMNS), torch.float16) for rank in range(2)]
        assert all(torch.equal(own[call][0], all_gather_reference(parts, WIDTH)) for own in got)


def test_takes_what_it_can_do() -> None:
    memories = [torch.zeros(InPlaceAllGather.memory_bytes(2, HALF_BYTES), dtype=torch.uint8, device=DEVICE)] * 2
    all_gather = as_rank(0, memories)
    x = torch.zeros(30, COLUMNS, dtype=torch.float16, device=DEVICE)
    assert all_gather.takes(x[:25], WIDTH)
    assert not all_gather.takes(x, WIDTH), "more than there is memory for"
    assert not all_gather.takes(x[:3], 41)
    assert not all_gather.takes(x[:3, :16], WIDTH)
    assert not all_gather.takes(x[:0], WIDTH)
