"""Linear layers and their fused forms: what they mean, on the CPU."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import skinny_linear as ops
from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.silu_and_mul import gelu_and_mul_reference, silu_and_mul_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(dtype: torch.dtype, rows: int = 3, inner: int = 48, outer: int = 64) -> list[torch.Tensor]:
    """x, residual, norm weight, weight, bias."""
    shapes = ((rows, inner), (rows, inner), (inner,), (outer, inner), (outer,))
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_references_are_the_plain_operations_in_sequence(
    dtype: torch.dtype, has_bias: bool, has_residual: bool
) -> None:
    x, residual, norm_weight, weight, bias = inputs(dtype)
    total = x + residual if has_residual else x
    linear = F.linear(rms_norm_reference(total, norm_weight, 1e-5), weight, bias if has_bias else None)
    args = (x, residual if has_residual else None, norm_weight, 1e-5, weight, bias if has_bias else None)
    for got, want in (
        (ops.rms_norm_linear_reference(*args), linear),
        (ops.rms_norm_gated_linear_reference(*args), silu_and_mul_reference(linear)),
        (ops.rms_norm_gated_linear_reference(*args, "gelu_tanh"), gelu_and_mul_reference(linear)),
    ):
        assert torch.equal(got[0], want) and torch.equal(got[1], total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_cpu_path_equals_the_references(dtype: torch.dtype, rows: int) -> None:
    x, residual, norm_weight, weight, bias = inputs(dtype, rows)
    close = {"atol": 0.1 if dtype == torch.bfloat16 else 0.02, "rtol": 4 * torch.finfo(dtype).eps}
    assert torch.equal(ops.skinny_linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(ops.gated_linear(x, weight, bias), ops.gated_linear_reference(x, weight, bias))
    for first in (residual, None):
        args = (x, first, norm_weight, 1e-5, weight, bias)
        torch.testing.assert_close(ops.rms_norm_linear(*args), ops.rms_norm_linear_reference(*args), **close)
        for gate in ("silu", "gelu_tanh"):
            gated = ops.rms_norm_gated_linear(*args, gate), ops.rms_norm_gated_linear_reference(*args, gate)
            torch.testing.assert_close(*gated, **close)


def test_inputs_are_unchanged() -> None:
    """No operand is written."""
    operands = inputs(torch.float32)
    before = [operand.clone() for operand in operands]
    x, residual, norm_weight, weight, bias = operands
    ops.rms_norm_gated_linear(x, residual, norm_weight, 1e-5, weight, bias)
    ops.gated_linear(x, weight, bias)
    assert all(torch.equal(now, then) for now, then in zip(operands, before, strict=True))
