"""The Triton linear layers against their references: every kernel, alone and fused, on sizes that leave remainders."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import small_linear as ops
from tests.kernels.twins import INTERPRETED, TOLERANCE, load_twin, randn, relative_error, twin_test

twin = load_twin("small_linear")
pytestmark = twin_test

HALF_TYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
# rows, outputs, inputs: one, two and three chunks, with and without a rest; outputs that end inside a program's share.
SIZES = [
    (1, 48, 576), (2, 16, 16), (3, 32, 256), (4, 80, 512),
    (5, 48, 576), (8, 16, 1024), (6, 80, 80), (8, 32, 512),
]  # fmt: skip


def scaled_weight(outputs: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return randn(outputs, inputs, dtype=dtype) / inputs**0.5


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), SIZES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_reference(
    dtype: torch.dtype, rows: int, outputs: int, inputs: int, gated: bool, has_bias: bool
) -> None:
    """Rows of x lie apart."""
    x = randn(rows, 2, inputs, dtype=dtype)[:, 1]
    weight = scaled_weight(outputs * (2 if gated else 1), inputs, dtype)
    bias = randn(weight.shape[0], dtype=dtype) if has_bias else None
    config = twin.choose(x, weight, gated)
    got = twin.small_linear_triton(x, weight, bias, config, gated)
    want = (ops.gated_linear_reference if gated else F.linear)(x, weight, bias)
    assert got.shape == want.shape and got.dtype == dtype
    assert relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), SIZES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norm_equals_reference(
    dtype: torch.dtype, rows: int, outputs: int, inputs: int, gated: bool, has_residual: bool
) -> None:
    """W5: x and the residual are read, never written."""
    x, residual = randn(rows, 3, inputs, dtype=dtype)[:, 1], randn(rows, 2, inputs, dtype=dtype)[:, 0]
    before = x.clone(), residual.clone()
    norm_weight, weight = randn(inputs, dtype=dtype), scaled_weight(outputs * (2 if gated else 1), inputs, dtype)
    args = (x, residual if has_residual else None, norm_weight, 1e-5, weight, None)
    config = twin.choose(x, weight, gated, normed=True)
    got, total = twin.rms_norm_linear_triton(*args, config, gated)
    want, want_total = (ops.rms_norm_gated_linear_reference if gated else ops.rms_norm_linear_reference)(*args)
    assert relative_error(got, want) < TOLERANCE[dtype]
    assert torch.equal(total, want_total)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [SIZES[0], SIZES[4]])
def test_gelu_and_float32_norm_weights(dtype: torch.dtype, rows: int, outputs: int, inputs: int) -> None:
    """As Gemma has them."""
    x, residual = randn(rows, inputs, dtype=dtype), randn(rows, inputs, dtype=dtype)
    norm_weight, weight = randn(inputs, dtype=torch.float32), scaled_weight(2 * outputs, inputs, dtype)
    config = twin.choose(x, weight, gated=True, normed=True)
    got, _ = twin.rms_norm_linear_triton(x, residual, norm_weight, 1e-5, weight, None, config, True, True)
    want, _ = ops.rms_norm_gated_linear_reference(x, residual, norm_weight, 1e-5, weight, None, "gelu_tanh")
    assert got.dtype == dtype and relative_error(got, want) < TOLERANCE[dtype]
    got = twin.small_linear_triton(x, weight, None, config, True, True)
    assert relative_error(got, ops.gated_linear_reference(x, weight, None, "gelu_tanh")) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [2, 4, 7])
def test_rows_do_not_influence_one_another(rows: int) -> None:
    x, weight = randn(rows, 256, dtype=torch.float16), scaled_weight(32, 256, torch.float16)
    config = twin.choose(x, weight)
    before = twin.small_linear_triton(x, weight, None, config)
    x[1:] = float("inf")
    after = twin.small_linear_triton(x, weight, None, config)
    assert torch.equal(before[0], after[0])


def test_choice_covers_what_the_kernels_can_do() -> None:
    weight = torch.empty(64, 128, dtype=torch.bfloat16)
    x = torch.empty(64, 128, dtype=torch.bfloat16)
    assert [type(twin.choose(x[:n], weight)) for n in (1, 4, 5, 8)] == [
        twin.VectorConfig, twin.VectorConfig, twin.TileConfig, twin.TileConfig
    ]  # fmt: skip
    x = x[:8]
    left_to_cublas = [
        (x[:0], weight), (torch.empty(9, 128, dtype=torch.bfloat16), weight), (x.float(), weight.float()),
        (x[:, ::2], weight[:, :64].contiguous()), (x[:, :120], weight[:, :120].contiguous()), (x, weight[:57]),
        (x[:, :64], weight[:, :64]), (x.half(), weight),
    ]  # fmt: skip
    assert [twin.choose(*case) for case in left_to_cublas] == [None] * len(left_to_cublas)
