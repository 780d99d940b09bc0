import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels.batch_invariant_linear import ROWS, batch_invariant_linear, in_row_tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (96, 64), (77, 100), (576, 1536)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_row_is_the_same_in_any_batch_and_place(
    out_features: int, in_features: int, dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features).to(dtype)
    offset = torch.randn(out_features).to(dtype) if bias else None
    x = torch.randn(5 * ROWS, in_features).to(dtype)
    whole = batch_invariant_linear(x, weight, offset)
    torch.testing.assert_close(
        whole, F.linear(x, weight, offset), rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=0.2
    )
    for num_rows in (1, 2, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 5):
        assert torch.equal(batch_invariant_linear(x[:num_rows], weight, offset), whole[:num_rows])
    order = torch.randperm(len(x))
    assert torch.equal(batch_invariant_linear(x[order], weight, offset), whole[order])
    assert torch.equal(batch_invariant_linear(x[7:8], weight, offset), whole[7:8])


def test_products_always_have_the_same_number_of_rows() -> None:
    seen = []

    def product(tile: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tile.shape))
        return 2 * tile

    x = torch.randn(2 * ROWS + 3, 5)[:, 1:]
    assert torch.equal(in_row_tiles(product, x), 2 * x)
    assert seen == [(ROWS, 4)] * 3
