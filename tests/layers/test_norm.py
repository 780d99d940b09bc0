"""Norms as layers: the offset of their weights, heads that are spread over ranks, and the one that is not there."""

import pytest
import torch
from torch import Tensor

from nanovllm.distributed.tensor_parallel import TensorParallel
from nanovllm.layers import fused_linear
from nanovllm.layers.fused_linear import FusedLinear
from nanovllm.layers.layer_norm import LayerNorm
from nanovllm.layers.linear_method import Gate, LinearSpec
from nanovllm.layers.norm import NoNorm, RMSNorm
from nanovllm.layers.ops import PLAIN
from nanovllm.layers.sharded_norm import ShardedRMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_offset_is_added_before_rounding(dtype: torch.dtype) -> None:
    """Weights near 0 in bfloat16 have more digits than 1 plus them would."""
    stored = (0.01 * torch.randn(64)).to(dtype)
    norm = RMSNorm(64, 1e-6, dtype, PLAIN, offset=1.0)
    dict(norm.weights("norm"))["norm.weight"].fill(stored)
    assert torch.equal(norm.weight, 1 + stored.float())
    x, residual = torch.randn(3, 64).to(dtype), torch.randn(3, 64).to(dtype)
    normed, total = norm(x, residual)
    assert normed.dtype == total.dtype == dtype and torch.equal(total, x + residual)


@pytest.mark.parametrize(("num_heads", "size"), [(4, 2), (4, 4), (2, 4)])
def test_a_norm_over_heads_of_several_ranks_is_that_of_the_whole(num_heads: int, size: int) -> None:
    """Heads are spread over ranks, or ranks share them."""
    x, weight = torch.randn(5, num_heads * 8), torch.randn(num_heads * 8)
    (whole,) = [ShardedRMSNorm(num_heads, range(num_heads), 8, 1e-5, torch.float32, TensorParallel(), PLAIN)]
    dict(whole.weights("norm"))["norm.weight"].fill(weight)
    expected, _ = whole(x)
    held = [TensorParallel(rank, size).kv_heads(num_heads) for rank in range(size)]
    columns = [slice(heads.start * 8, heads.stop * 8) for heads in held]
    sum_of_means = sum(x[:, part].square().mean(-1, keepdim=True) for part in columns)

    class Together(TensorParallel):
        def all_reduce(self, x: Tensor) -> Tensor:
            return torch.as_tensor(sum_of_means)

    for rank in range(size):
        norm = ShardedRMSNorm(num_heads, held[rank], 8, 1e-5, torch.float32, Together(rank, size), PLAIN)
        dict(norm.weights("norm"))["norm.weight"].fill(weight)
        torch.testing.assert_close(norm(x[:, columns[rank]])[0], expected[:, columns[rank]])


def test_no_norm_is_the_residual_addition() -> None:
    x, residual = torch.randn(2, 8), torch.randn(2, 8)
    assert all(torch.equal(out, x + residual) for out in NoNorm()(x, residual))
    assert NoNorm()(x)[1] is x
    assert not list(NoNorm().weights("norm"))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_norm_is_taken_for_no_rms_norm(
    has_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before a product that takes RMS norms into its kernel: it has the norm computed first."""
    norm = LayerNorm(16, 0.1, has_bias, dtype)
    specs = dict(norm.weights("n"))
    assert list(specs) == ["n.weight", "n.bias"][: 1 + has_bias]
    for spec in specs.values():
        spec.fill(torch.randn(16))
    x, residual = (torch.randn(3, 16).to(dtype) for _ in range(2))
    normed, total = norm(x, residual)
    assert torch.equal(total, x + residual) and norm(x)[1] is x
    values = total.float() - total.float().mean(-1, keepdim=True)
    expected = values / (values.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.gain.float()
    if norm.bias is not None:
        expected += norm.bias.float()
    torch.testing.assert_close(normed, expected.to(dtype))

    linear = FusedLinear(LinearSpec((4,), (range(4),), 16, range(16), dtype, ("l",)))
    dict(linear.weights(0))["weight"].fill(torch.randn(4, 16))
    monkeypatch.setattr(fused_linear, "rms_norm_linear", None)
    monkeypatch.setattr(fused_linear, "rms_norm_gated_linear", None)
    product, again = linear.multiply_after_norm(norm, x, residual, None, Gate("silu", PLAIN.silu_and_mul))
    assert torch.equal(product, PLAIN.silu_and_mul(linear.multiply(normed, None))) and torch.equal(again, total)
