import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.kernels.twins import DEVICE, DTYPES, TOLERANCE, load_twin, ordered_dot, randn, relative_error, twin_test

pytestmark = twin_test
twin, gates = load_twin("batch_invariant.linear"), load_twin("silu_and_mul")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 16), (96, 64), (77, 200), (40, 1536)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_twin_equals_the_product_and_a_row_is_the_same_in_any_batch(
    out_features: int, in_features: int, dtype: torch.dtype, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: alone, in any place, among 1 to 300 rows; rows may be strided. 1,536 inputs are three spans, which
    programs share where rows are few."""
    torch.manual_seed(0)
    monkeypatch.setattr(twin, "SHARED_ROWS", 100)
    weight, x = randn(out_features, in_features, dtype=dtype), randn(300, in_features + 3, dtype=dtype)[:, :in_features]
    bias = randn(out_features, dtype=dtype) if has_bias else None
    semaphores = twin.new_semaphores(DEVICE)
    whole = twin.batch_invariant_linear_triton(x, weight, bias, semaphores)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert relative_error(whole, expected) < TOLERANCE[dtype]
    for num_rows in (1, 2, 64, 65, 200):
        assert torch.equal(twin.batch_invariant_linear_triton(x[:num_rows], weight, bias, semaphores), whole[:num_rows])
    order = torch.randperm(300, device=DEVICE)
    assert torch.equal(twin.batch_invariant_linear_triton(x[order], weight, bias), whole[order])
    assert not semaphores.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "in_features"), [("silu", 200), ("gelu_tanh", 1536)])
def test_the_gate_in_the_product_leaves_the_bits_of_the_gate_behind_it(
    activation: str, in_features: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, bias = randn(48, in_features, dtype=dtype) / 40, randn(48, dtype=dtype)
    x = randn(70, in_features, dtype=dtype)
    if not twin.is_skinny(x[:1], weight):
        pytest.skip("the gate is a kernel of its own")
    product = twin.batch_invariant_linear_triton(x, weight, bias)
    whole = gates.silu_and_mul_triton(product, gelu=activation == "gelu_tanh")
    for num_rows in (1, 33, 64):
        gated = twin.batch_invariant_linear_triton(x[:num_rows], weight, bias, activation=activation)
        assert torch.equal(gated, whole[:num_rows])
    assert not twin.is_skinny(x, weight)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_the_interpreters_products_are_the_same_wherever_a_row_or_column_lies(size: int) -> None:
    """What the tests of twins to the bit stand on, whatever the processor is."""
    rng = np.random.default_rng(0)
    row, matrix = rng.standard_normal(64, np.float32), rng.standard_normal((64, size), np.float32)
    rows = ordered_dot(np.tile(row, (size, 1)), matrix, np.float32)
    columns = ordered_dot(matrix.T, np.tile(row[:, None], (1, size)), np.float32)
    assert (rows == rows[0]).all() and (columns == columns[:, :1]).all()
    np.testing.assert_allclose(rows[0], row.astype(float) @ matrix, rtol=1e-4, atol=1e-5)
