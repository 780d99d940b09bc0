"""Products straight from codes, dense copies and rounded inputs, against the PyTorch references."""

import pytest
import torch

from nanovllm.kernels import quantized_linear
from nanovllm.kernels.quantized_linear import (
    NormOfRow,
    QuantizedWeight,
    RowRounding,
    dequantize_reference,
    fp8_linear,
    fused_row,
    pack_int4,
    round_rows_reference,
)
from nanovllm.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from nanovllm.kernels.silu_and_mul import gelu_and_mul_reference, silu_and_mul_reference
from tests.kernels.triton.plain_codes import plain_dot_int4, plain_dot_int8, plain_fp8_numbers, plain_split_int4
from tests.kernels.twins import DEVICE, INTERPRETED, TOLERANCE, load_twin, randn, relative_error, twin_test

pytestmark = twin_test
twin = load_twin("linear.quantized_linear")
new_semaphores = load_twin("linear.skinny_gemm").new_semaphores
DTYPES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def without_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter knows none."""
    if INTERPRETED:
        monkeypatch.setattr(load_twin("linear.quantized_gemm"), "split_int4", plain_split_int4)
        words = load_twin("linear.words")
        monkeypatch.setattr(words, "dot_int4", plain_dot_int4)
        monkeypatch.setattr(words, "dot_int8", plain_dot_int8)
        monkeypatch.setattr(words, "fp8_numbers", plain_fp8_numbers)
        monkeypatch.setattr(load_twin("linear.row_inputs"), "dot_int8", plain_dot_int8)


def random_weight(
    kind: str, outputs: int, inputs: int, group_size: int | None, has_zeros: bool, has_low: bool = False
) -> QuantizedWeight:
    groups = 1 if group_size is None else inputs // group_size
    zero = torch.randint(-8, 8, (outputs, groups), dtype=torch.int8).to(DEVICE) if has_zeros else None
    low = torch.randn(outputs, groups).half().to(DEVICE) / 20 if has_low else None
    if kind == "int4":
        codes = pack_int4(torch.randint(-8, 8, (outputs, inputs)))
    elif kind == "int8":
        codes = torch.randint(-119, 120, (outputs, inputs), dtype=torch.int8)
    else:  # numbers that FP8 has
        codes = (torch.randint(-15, 16, (outputs, inputs)) * 4.0).to(torch.float8_e4m3fn)
    scale = torch.rand(outputs, groups).to(DEVICE) / 100
    return QuantizedWeight(codes.to(DEVICE), scale.half() if has_low else scale, zero, group_size or inputs, low)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(
    ("num_rows", "outputs", "inputs", "group_size", "more"),
    [(2, 128, 512, 128, "zeros"), (7, 200, 256, 32, "low"), (17, 64, 384, None, ""), (40, 72, 256, 64, "zeros")],
)
def test_products(
    dtype: torch.dtype, kind: str, num_rows: int, outputs: int, inputs: int, group_size: int | None, more: str
) -> None:
    """Outputs and rows that do not fill a tile; a bias; splits. A row is the same whatever the others are."""
    weight = random_weight(
        kind, outputs, inputs, group_size, more == "zeros" and kind != "fp8", more == "low" and kind != "fp8"
    )
    x, bias = randn(num_rows, inputs, dtype=dtype), randn(outputs, dtype=dtype)
    want = x.float() @ dequantize_reference(weight, torch.float32).t()
    config = twin.choose(x, weight)
    assert config is not None
    semaphores = new_semaphores(DEVICE)
    for splits, rows in sorted({(1, 16), (config.splits, config.rows)}):
        own = config._replace(splits=splits, rows=rows, stages=2)
        got = twin.quantized_linear_triton(x, weight, None, own, semaphores)
        assert relative_error(got, want) < TOLERANCE[dtype]
        with_bias = twin.quantized_linear_triton(x, weight, bias, own, semaphores)
        assert relative_error(with_bias, want + bias.float()) < TOLERANCE[dtype]
        others = torch.cat((x[:1], 100 * x[1:]))
        assert torch.equal(twin.quantized_linear_triton(others, weight, None, own, semaphores)[0], got[0])
    assert not semaphores.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group_size", "more"),
    [(128, 512, 128, "zeros"), (20, 256, 32, "low"), (30, 1152, None, ""), (9, 1280, 64, "zeros")],
)
def test_a_row(dtype: torch.dtype, kind: str, outputs: int, inputs: int, group_size: int | None, more: str) -> None:
    """Chunks of inputs that are not full, several chunks, outputs that do not fill a program, programs that go on."""
    weight = random_weight(
        kind, outputs, inputs, group_size, more == "zeros" and kind != "fp8", more == "low" and kind != "fp8"
    )
    x, bias = randn(1, inputs, dtype=dtype), randn(outputs, dtype=dtype)
    want = x.float() @ dequantize_reference(weight, torch.float32).t()
    got = twin.quantized_linear_triton(x, weight, None, twin.GemvConfig(8, lanes=16, num_warps=2, ahead=2, programs=2))
    assert relative_error(got, want) < TOLERANCE[dtype]
    with_bias = twin.quantized_linear_triton(x, weight, bias, twin.choose(x, weight))
    assert relative_error(with_bias, want + bias.float()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(
    ("rounding", "has_residual", "gate"),
    [
        (RowRounding("int8"), True, "silu"),
        (RowRounding("int8", 64), False, None),
        (RowRounding("fp8"), True, None),
        (RowRounding("int8", None, torch.tensor([0.02])), False, "gelu_tanh"),
        (None, True, "gelu_tanh"),
    ],
)
def test_a_row_with_what_stands_around_it(
    dtype: torch.dtype, kind: str, rounding: RowRounding | None, has_residual: bool, gate: str | None
) -> None:
    """Norm, rounding, product and gate in one kernel, beside one after the other."""
    inputs, outputs = 1152, 40
    weight = random_weight(kind, outputs * (1 if gate is None else 2), inputs, 128, kind == "int4")
    x, norm_weight = randn(1, inputs, dtype=dtype), randn(inputs, dtype=dtype)
    residual = randn(1, inputs, dtype=dtype) if has_residual else None
    if rounding is not None and rounding.scale is not None:
        rounding = rounding._replace(scale=rounding.scale.to(DEVICE))
    row, total = x, x
    if residual is None:
        row = rms_norm_reference(x, norm_weight, 1e-6)
    else:
        row, total = add_rms_norm_reference(x, residual, norm_weight, 1e-6)
    if rounding is not None:
        row = round_rows_reference(row, *rounding)
    want = row.float() @ dequantize_reference(weight, torch.float32).t()
    if gate is not None:
        want = {"silu": silu_and_mul_reference, "gelu_tanh": gelu_and_mul_reference}[gate](want)
    assert twin.fuses_norm(x, norm_weight) and (rounding is None or twin.fuses_rounding(weight, rounding))
    norm = NormOfRow(residual, norm_weight, 1e-6)
    got, got_total = twin.fused_row_triton(x, norm, weight, None, rounding, gate)
    rounds_down = INTERPRETED and rounding is not None and rounding.kind == "fp8"  # by 1/8 at most
    assert relative_error(got, want) < (0.125 if rounds_down else 2 * TOLERANCE[dtype])
    assert torch.equal(got_total, total)


def test_what_does_not_fit_in_is_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm in another dtype; a rounding whose groups are no lane's; an input that is no number."""
    monkeypatch.setattr(quantized_linear, "use_triton", lambda x: True)
    weight, x = random_weight("int8", 24, 192, None, False), randn(1, 192, dtype=torch.float16)
    norm = NormOfRow(None, randn(192, dtype=torch.float32), 1e-6)
    normed = rms_norm_reference(x, norm.weight, 1e-6)
    dense = dequantize_reference(weight, torch.float32)
    for rounding in (RowRounding("int8"), RowRounding("int8", 24)):
        fused = fused_row(x, norm, weight, None, rounding, None)
        assert fused is not None
        product, total = fused
        assert relative_error(product, round_rows_reference(normed, *rounding).float() @ dense.t()) < 4e-3
        assert total is x
    assert fused_row(x.expand(2, -1), norm, weight, None, None, None) is None
    x[0, 7] = torch.nan
    fused = fused_row(x, None, weight, None, None, None)
    assert fused is not None and fused[0].isnan().all()


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(("group_size", "has_low"), [(None, False), (24, False), (64, False), (32, True)])
def test_dense_copies(kind: str, group_size: int | None, has_low: bool) -> None:
    weight = random_weight(
        kind, 20, 192, group_size, has_zeros=kind != "fp8" and not has_low, has_low=has_low and kind != "fp8"
    )
    got = twin.dequantize_triton(weight, torch.float16)
    assert relative_error(got, dequantize_reference(weight, torch.float32)) < TOLERANCE[torch.float16]


def test_a_last_group_that_is_shorter() -> None:
    weight = random_weight("int8", 6, 96, None, has_zeros=False)
    weight = weight._replace(scale=torch.rand(6, 2).to(DEVICE), group_size=64)
    got = twin.dequantize_triton(weight, torch.float16)
    assert relative_error(got, dequantize_reference(weight, torch.float32)) < TOLERANCE[torch.float16]
    thirds = weight._replace(scale=torch.rand(6, 3).to(DEVICE), group_size=30)
    assert twin.choose(randn(3, 90, dtype=torch.float16), thirds) is None, "groups of 30"


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("group_size", [None, 32, 100])
@pytest.mark.parametrize("is_static", [False, True])
def test_rounded_inputs(kind: str, group_size: int | None, is_static: bool) -> None:
    """A number between two codes may go to either, and does in Triton's interpreter: FP8 goes down, by 1/8 at most."""
    x = randn(6, 250, dtype=torch.float16)
    x[2] = 0
    scale = torch.tensor([0.02], device=DEVICE) if is_static else None
    own_size = None if is_static else group_size
    got = twin.round_rows_triton(x, kind, own_size, scale)
    want = round_rows_reference(x, kind, own_size, scale)
    assert relative_error(got, want.float()) < (0.125 if kind == "fp8" and INTERPRETED else 0.01)
    assert not got[2].any()
    if not is_static and group_size is None:
        codes, scales = twin.quantize_rows_triton(x, kind)
        assert torch.equal((codes.float() * scales).to(x.dtype), got)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU that multiplies FP8")
@pytest.mark.parametrize("num_rows", [1, 2, 300])
def test_fp8_products(num_rows: int) -> None:
    """Positive numbers, so that a sum that is not exact shows."""
    weight = random_weight("fp8", 256, 512, None, has_zeros=False)
    weight = weight._replace(codes=weight.codes.float().abs().to(torch.float8_e4m3fn))
    x = randn(num_rows, 512, dtype=torch.bfloat16).abs()
    want = round_rows_reference(x, "fp8", None, None).float() @ dequantize_reference(weight, torch.float32).t()
    assert relative_error(fp8_linear(x, weight), want) < TOLERANCE[torch.bfloat16]
