import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.kernels.twins import DEVICE, DTYPES, TOLERANCE, load_twin, ordered_dot, randn, relative_error, twin_test

pytestmark = twin_test
twin = load_twin("batch_invariant.linear")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 16), (96, 64), (77, 200)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_twin_equals_the_product_and_a_row_is_the_same_in_any_batch(
    out_features: int, in_features: int, dtype: torch.dtype, has_bias: bool
) -> None:
    """To the bit: alone, in any place, among 1 to 300 rows; rows may be strided."""
    torch.manual_seed(0)
    weight, x = randn(out_features, in_features, dtype=dtype), randn(300, in_features + 3, dtype=dtype)[:, :in_features]
    bias = randn(out_features, dtype=dtype) if has_bias else None
    whole = twin.batch_invariant_linear_triton(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert relative_error(whole, expected) < TOLERANCE[dtype]
    for num_rows in (1, 2, 64, 65, 200):
        assert torch.equal(twin.batch_invariant_linear_triton(x[:num_rows], weight, bias), whole[:num_rows])
    order = torch.randperm(300, device=DEVICE)
    assert torch.equal(twin.batch_invariant_linear_triton(x[order], weight, bias), whole[order])


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_the_interpreters_products_are_the_same_wherever_a_row_or_column_lies(size: int) -> None:
    """What the tests of twins to the bit stand on, whatever the processor is."""
    rng = np.random.default_rng(0)
    row, matrix = rng.standard_normal(64, np.float32), rng.standard_normal((64, size), np.float32)
    rows = ordered_dot(np.tile(row, (size, 1)), matrix, np.float32)
    columns = ordered_dot(matrix.T, np.tile(row[:, None], (1, size)), np.float32)
    assert (rows == rows[0]).all() and (columns == columns[:, :1]).all()
    np.testing.assert_allclose(rows[0], row.astype(float) @ matrix, rtol=1e-4, atol=1e-5)
