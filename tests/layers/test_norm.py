"""Norms as layers: the offset of their weights, heads that are spread over ranks, and the one that is not there."""

import pytest
import torch
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import PLAIN
from nanovllm.layers.sharded_norm import ShardedRMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_offset_is_added_before_rounding(dtype: torch.dtype) -> None:
    """Weights near 0 in bfloat16 have more digits than 1 plus them would."""
    stored = (0.01 * torch.randn(64)).to(dtype)
    norm = RMSNorm(64, 1e-6, dtype, PLAIN, offset=1.0)
    dict(norm.slots("norm"))["norm.weight"].fill(stored)
    assert torch.equal(norm.weight, 1 + stored.float())
    x, residual = torch.randn(3, 64).to(dtype), torch.randn(3, 64).to(dtype)
    normed, total = norm(x, residual)
    assert normed.dtype == total.dtype == dtype and torch.equal(total, x + residual)


@pytest.mark.parametrize(("num_heads", "size"), [(4, 2), (4, 4), (2, 4)])
def test_a_norm_over_heads_of_several_ranks_is_that_of_the_whole(num_heads: int, size: int) -> None:
    """W8, C18: heads are spread over ranks, or ranks share them."""
    x, weight = torch.randn(5, num_heads * 8), torch.randn(num_heads * 8)
    (whole,) = [ShardedRMSNorm(num_heads, range(num_heads), 8, 1e-5, torch.float32, TensorParallel(), PLAIN)]
    dict(whole.slots("norm"))["norm.weight"].fill(weight)
    expected, _ = whole(x)
    held = [TensorParallel(rank, size).kv_heads(num_heads) for rank in range(size)]
    columns = [slice(heads.start * 8, heads.stop * 8) for heads in held]
    sum_of_means = sum(x[:, part].square().mean(-1, keepdim=True) for part in columns)

    class Together(TensorParallel):
        def all_reduce(self, x: Tensor) -> Tensor:
            return torch.as_tensor(sum_of_means)

    for rank in range(size):
        norm = ShardedRMSNorm(num_heads, held[rank], 8, 1e-5, torch.float32, Together(rank, size), PLAIN)
        dict(norm.slots("norm"))["norm.weight"].fill(weight)
        torch.testing.assert_close(norm(x[:, columns[rank]])[0], expected[:, columns[rank]])


def test_no_norm_is_the_residual_addition() -> None:
    x, residual = torch.randn(2, 8), torch.randn(2, 8)
    assert all(torch.equal(out, x + residual) for out in NoNorm()(x, residual))
    assert NoNorm()(x)[1] is x
    assert not list(NoNorm().slots("norm"))
