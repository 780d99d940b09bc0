"""Packed products equal plain ones, whatever the number of rows."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.layers.linear_method import LinearSpec
from nanovllm.layers.packed_linear import PackedLinear, multiply_packed, pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(960, 576), (7, 33), (1, 1)])
def test_equals_linear(dtype: torch.dtype, with_bias: bool, out_features: int, in_features: int) -> None:
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features).to(dtype) if with_bias else None
    packed = pack(weight)
    if packed is None:
        pytest.skip("this CPU has no fast kernel for the dtype")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for rows in (0, 1, 3, 64, 130):
        x = torch.randn(rows, in_features).to(dtype)
        torch.testing.assert_close(
            multiply_packed(x, packed, bias), F.linear(x, weight, bias), atol=tolerance, rtol=tolerance
        )


def test_original_weight_may_go() -> None:
    weight, x = torch.randn(32, 16), torch.randn(4, 16)
    expected = F.linear(x, weight)
    packed = pack(weight)
    if packed is None:
        pytest.skip("oneDNN is not built in")
    weight.zero_()
    torch.testing.assert_close(multiply_packed(x, packed, None), expected, atol=1e-5, rtol=1e-5)


def test_strided_rows() -> None:
    weight, wide = torch.randn(32, 16), torch.randn(4, 40)
    packed = pack(weight)
    if packed is None:
        pytest.skip("oneDNN is not built in")
    torch.testing.assert_close(
        multiply_packed(wide[:, 8:24], packed, None), F.linear(wide[:, 8:24], weight), atol=1e-5, rtol=1e-5
    )


def test_not_for_other_devices() -> None:
    assert pack(torch.empty(4, 4, device="meta")) is None


def test_a_layer_keeps_one_copy() -> None:
    """Packed, the plain weight is freed; a table that lends its tensor to a head keeps it."""
    table = PackedLinear(LinearSpec((32,), (range(32),), 16, range(16), torch.float32))
    weight, x = torch.randn(32, 16), torch.randn(4, 16)
    ((_, spec),) = table.weights(0)
    spec.fill(weight)
    head = table.tied()
    head.finish()
    torch.testing.assert_close(head.multiply(x, None), F.linear(x, weight), atol=1e-5, rtol=1e-5)
    assert torch.equal(table.gather_rows(torch.arange(32)), weight)
    if pack(weight) is not None:
        assert sum(parameter.numel() for parameter in head.parameters()) == 0
