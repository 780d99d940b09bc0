"""The Triton norms against their references."""

import pytest
import torch

from nanovllm.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from tests.kernels.twins import DTYPES, TOLERANCE, load_twin, randn, relative_error, twin_test

twin = load_twin("rms_norm")
pytestmark = twin_test


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 576), (0, 16), (5, 100), (2, 3, 96), (1, 1, 7), (2, 2, 2, 32), (19,)])
def test_equals_reference(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    got = twin.rms_norm_triton(x, weight, 1e-5)
    assert got.shape == x.shape and got.dtype == dtype
    assert relative_error(got, rms_norm_reference(x, weight, 1e-5)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_and_heads(dtype: torch.dtype) -> None:
    qkv, weight = randn(5, 10, 32, dtype=dtype), randn(32, dtype=dtype)
    for x in (qkv[:, 2:5], qkv[:, 3], qkv[::2, 1:3], qkv.transpose(0, 1)):
        want = rms_norm_reference(x, weight, 1e-6)
        assert relative_error(twin.rms_norm_triton(x, weight, 1e-6), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 576), (0, 16)])
def test_add_norm_is_pure_and_equal(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Neither input is written."""
    x, residual, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    before = x.clone(), residual.clone()
    normed, total = twin.add_rms_norm_triton(x, residual, weight, 1e-6)
    want_normed, want_total = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])
    assert torch.equal(total, want_total)
    assert relative_error(normed, want_normed) < TOLERANCE[dtype]


def test_weights_may_be_float32() -> None:
    x, residual = randn(3, 64, dtype=torch.float16), randn(3, 64, dtype=torch.float16)
    weight = 1 + 0.01 * randn(64, dtype=torch.float32)
    assert relative_error(twin.rms_norm_triton(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)) < 2e-3
    got, want = (norm(x, residual, weight, 1e-5)[0] for norm in (twin.add_rms_norm_triton, add_rms_norm_reference))
    assert got.dtype == x.dtype and relative_error(got, want) < 2e-3
