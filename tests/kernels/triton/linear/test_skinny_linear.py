"""The Triton linear layers against their references: every kernel, alone and fused, on sizes that leave remainders."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import skinny_linear as ops
from tests.kernels.twins import DEVICE, INTERPRETED, TOLERANCE, load_twin, randn, relative_error, twin_test

twin, tile = load_twin("linear.skinny_linear"), load_twin("linear.skinny_gemm")
pytestmark = twin_test

HALF_TYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
# rows, outputs, inputs: one, two and three chunks, with and without a rest; outputs that end inside a program's share.
SIZES = [
    (1, 48, 576), (2, 16, 16), (3, 32, 256), (4, 80, 512),
    (5, 48, 576), (8, 16, 1024), (6, 80, 80), (8, 32, 512), (2, 16, 3200), (13, 32, 80), (40, 80, 2304),
    (64, 80, 1008), (17, 48, 1024), (16, 32, 1280),
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
    got = twin.skinny_linear_triton(x, weight, bias, config, gated)
    want = (ops.gated_linear_reference if gated else F.linear)(x, weight, bias)
    assert got.shape == want.shape and got.dtype == dtype
    assert relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), SIZES[:8])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
def test_norm_equals_reference(
    dtype: torch.dtype, rows: int, outputs: int, inputs: int, gated: bool, has_residual: bool
) -> None:
    """x and the residual are read, never written."""
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
    got = twin.skinny_linear_triton(x, weight, None, config, True, True)
    assert relative_error(got, ops.gated_linear_reference(x, weight, None, "gelu_tanh")) < TOLERANCE[dtype]


# rows, outputs, inputs, and a form of the tile kernel: split or not, all chunks held or some, with and without a rest.
TILES = [
    (5, 48, 576, {"outputs": 16, "num_warps": 4, "slices": 4, "chunk": 256, "ahead": 2, "x_ahead": 1, "splits": 1}),
    (8, 80, 1024, {"outputs": 16, "num_warps": 4, "slices": 1, "chunk": 256, "ahead": 1, "x_ahead": 2, "splits": 2}),
    (16, 16, 96, {"outputs": 32, "num_warps": 4, "slices": 1, "chunk": 64, "ahead": 1, "x_ahead": 1, "splits": 2}),
    (17, 144, 768, {"outputs": 64, "num_warps": 4, "slices": 1, "chunk": 128, "ahead": 1, "x_ahead": 1, "splits": 4}),
    (33, 80, 320, {"outputs": 64, "num_warps": 4, "slices": 1, "chunk": 64, "ahead": 2, "x_ahead": 3, "splits": 1}),
    (64, 64, 640, {"outputs": 32, "num_warps": 4, "slices": 2, "chunk": 128, "ahead": 3, "x_ahead": 1, "splits": 1}),
]


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs", "form"), TILES)
@pytest.mark.parametrize("gated", [False, True])
def test_every_form_of_the_tile_kernel(
    dtype: torch.dtype, rows: int, outputs: int, inputs: int, form: dict[str, int], gated: bool
) -> None:
    """Again and again with the same counters, which are 0 after each call: the same bits."""
    x, weight = randn(rows, 2, inputs, dtype=dtype)[:, 1], scaled_weight(outputs * (2 if gated else 1), inputs, dtype)
    bias, semaphores, config = randn(weight.shape[0], dtype=dtype), tile.new_semaphores(DEVICE), twin.GemmConfig(**form)
    first, again = (
        twin.skinny_linear_triton(x, weight, bias, config, gated, semaphores=semaphores, gelu=gated) for _ in range(2)
    )
    want = ops.gated_linear_reference(x, weight, bias, "gelu_tanh") if gated else F.linear(x, weight, bias)
    assert relative_error(first, want) < TOLERANCE[dtype]
    assert torch.equal(first, again) and not semaphores.any()


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 1024), (1, 2320), (3, 1040)])
def test_warps_that_share_outputs(dtype: torch.dtype, rows: int, inputs: int) -> None:
    """As the vector kernel does for long inputs."""
    x, weight, bias = randn(rows, inputs, dtype=dtype), scaled_weight(96, inputs, dtype), randn(96, dtype=dtype)
    residual, norm_weight = randn(rows, inputs, dtype=dtype), randn(inputs, dtype=dtype)
    config = twin.GemvConfig(outputs=4, num_warps=4, ahead=2, chunk=1024)
    got = twin.skinny_linear_triton(x, weight, bias, config, gated=True)
    assert relative_error(got, ops.gated_linear_reference(x, weight, bias)) < TOLERANCE[dtype]
    got, total = twin.rms_norm_linear_triton(x, residual, norm_weight, 1e-5, weight, bias, config)
    want, want_total = ops.rms_norm_linear_reference(x, residual, norm_weight, 1e-5, weight, bias)
    assert relative_error(got, want) < TOLERANCE[dtype] and torch.equal(total, want_total)


@pytest.mark.parametrize(("rows", "inputs"), [(2, 512), (4, 512), (7, 512), (64, 2048)])
def test_rows_do_not_influence_one_another(rows: int, inputs: int) -> None:
    x, weight = randn(rows, inputs, dtype=torch.float16), scaled_weight(32, inputs, torch.float16)
    config = twin.choose(x, weight)
    before = twin.skinny_linear_triton(x, weight, None, config)
    x[1:] = float("inf")
    after = twin.skinny_linear_triton(x, weight, None, config)
    assert torch.equal(before[0], after[0])


def test_choice_covers_what_the_kernels_can_do() -> None:
    weight = torch.empty(64, 128, dtype=torch.bfloat16)
    x = torch.empty(65, 128, dtype=torch.bfloat16)
    assert [type(twin.choose(x[:n], weight)) for n in (1, 2, 8, 16)] == [
        twin.GemvConfig, twin.GemmConfig, twin.GemmConfig, twin.GemmConfig
    ]  # fmt: skip
    left_to_cublas = [
        (x[:0], weight), (x, weight), (x[:8].float(), weight.float()),
        (x[:8, ::2], weight[:, :64].contiguous()), (x[:8, :120], weight[:, :120].contiguous()), (x[:8], weight[:57]),
        (x[:8, :64], weight[:, :64]), (x[:8].half(), weight),
    ]  # fmt: skip
    assert [twin.choose(*case) for case in left_to_cublas] == [None] * len(left_to_cublas)
    assert twin.choose(x[:16], weight, normed=True) is None
    assert twin.choose_by_size(17, 64, 128, gated=False, normed=False, is_roomy=False) is None
    longer = torch.empty(64, 1280, dtype=torch.bfloat16)
    assert twin.choose(longer[:16], longer) and twin.choose(longer[:17], longer) is None
    wide = torch.empty(4096, 4096, dtype=torch.bfloat16)
    assert [type(twin.choose(wide[:n], wide)) for n in (1, 2, 8)] == [
        twin.GemvConfig, twin.GemvConfig, twin.GemmConfig
    ]  # fmt: skip
    assert twin.choose(wide[:9], wide) is None and twin.choose(wide[:8], wide, gated=True) is None
    wider = torch.empty(16, 8192, dtype=torch.bfloat16)
    assert twin.choose(wider[:1], wider) and twin.choose(wider[:2], wider) is None
