"""The Triton copy of rows against PyTorch's."""

import pytest
import torch

from nanovllm.kernels.gather_rows import gather_rows_reference
from tests.kernels.twins import DEVICE, DTYPES, load_twin, twin_test

twin = load_twin("gather_rows")
pytestmark = twin_test


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 128), (7, 80), (3, 1024), (4, 2600), (0, 16)])
def test_copies_bits(dtype: torch.dtype, index_dtype: torch.dtype, num_rows: int, width: int) -> None:
    table = torch.randn(50, width).to(dtype).to(DEVICE)
    index = torch.randint(50, (num_rows,)).to(index_dtype).to(DEVICE)
    assert torch.equal(twin.gather_rows_triton(table, index), gather_rows_reference(table, index))


def test_some_columns_of_a_wider_table_and_a_part_of_an_index() -> None:
    table, index = torch.randn(9, 100, device=DEVICE), torch.tensor([3, 8, 0, 8], dtype=torch.int32, device=DEVICE)
    got = twin.gather_rows_triton(table[:, :70], index[1:])
    assert torch.equal(got, table[[8, 0, 8], :70])
