"""Random quantized weights in every form, and their products in C++ against float64."""

import torch

from nanovllm.kernels.cpu.cpu_kernels import CpuKernels
from nanovllm.kernels.quantized_linear import QuantizedWeight, dequantize_reference, round_rows_reference

FORMS = ["zeros", "low", "symmetric"]
SIZES = [  # outputs, inputs, group size: vectors, tiles of outputs and stretches of blocks that are not full
    (13, 576, 32), (4, 96, 32), (5, 2304, 128), (7, 2112, None), (6, 160, 16),
]  # fmt: skip


def random_weight(kind: str, outputs: int, inputs: int, group_size: int | None, form: str) -> QuantizedWeight:
    groups = inputs // (group_size or inputs)
    codes = (
        torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
        if kind in ("int4", "e2m1")
        else torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    )
    if kind == "e2m1":
        return QuantizedWeight(
            codes, torch.randint(112, 122, (outputs, groups), dtype=torch.uint8), None, inputs // groups
        )
    scale, low = torch.rand(outputs, groups) / 100, torch.randn(outputs, groups) / 10
    zero = torch.randint(-8, 8, (outputs, groups), dtype=torch.int8)
    size = group_size or inputs
    if form == "low":
        return QuantizedWeight(codes, scale.half(), None, size, low.half())
    return QuantizedWeight(codes, scale, zero if form == "zeros" else None, size)


def check_products(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """Copies to the bit but for their rounding; a row is the same whatever the others are."""
    for kind in ("int4", "int8", "e2m1"):
        for form in FORMS if kind != "e2m1" else FORMS[:1]:
            for outputs, inputs, group_size in SIZES:
                weight = random_weight(kind, outputs, inputs, group_size, form)
                parts = weight.codes, weight.scale, weight.zero, weight.low
                dense = dequantize_reference(weight, torch.float32)
                copy = kernels.quantized_linear(None, *parts, None, dtype)
                if kind != "int8" and group_size == 16:
                    assert copy is None
                    continue
                assert copy is not None
                torch.testing.assert_close(
                    copy, dense.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
                )
                x, bias = torch.randn(6, inputs).to(dtype), torch.randn(outputs).to(dtype)
                got = kernels.quantized_linear(x, *parts, bias, dtype)
                assert got is not None
                want = (x.double() @ dense.double().t() + bias.double()).to(dtype)
                error = (got.float() - want.float()).norm() / want.float().norm()
                assert error < (4e-3 if dtype == torch.bfloat16 else 1e-5), (kind, form, outputs, inputs, group_size)
                alone = kernels.quantized_linear(x[5:], *parts, bias, dtype)
                assert alone is not None and torch.equal(alone, got[5:])


def check_rounded_products(kernels: CpuKernels, dtype: torch.dtype) -> None:
    """Of inputs as `round_rows` has them, with ties, outliers and zeros; a row is the same whatever the others are, and
    with the norm before it and the activation after it as with these by themselves."""
    for kind, group_size, form in (("int4", 32, "low"), ("int4", 32, ""), ("int8", 32, "low"), ("int8", 16, "")):
        for outputs, inputs in ((37, 576), (4, 96), (6, 2304), (16, 512)):
            weight = random_weight(kind, outputs, inputs, group_size, form)
            weight = weight._replace(scale=weight.scale.half())
            product = kernels.rounded_product(weight.codes, weight.scale, weight.low)
            assert product is not None
            x, bias = torch.randn(6, inputs).to(dtype), torch.randn(outputs).to(dtype)
            x[1], x[2, ::7], x[3, :32] = 0, 50, torch.arange(32) - 127.0
            x[3, 3] = 63.5
            got = product(x, bias)
            assert got is not None
            rounded = round_rows_reference(x.float(), "int8", 32, None).double()
            want = rounded @ dequantize_reference(weight, torch.float32).double().t() + bias.double()
            error = (got.float() - want.float()).norm() / want.float().norm()
            assert error < (4e-3 if dtype == torch.bfloat16 else 1e-5), (kind, form, outputs, inputs, group_size)
            for rows in (x[5:], x[1:6]):
                alone = product(rows, bias)
                assert alone is not None and torch.equal(alone[-1], got[5])
            norm_weight = torch.randn(inputs).to(dtype)
            for residual in (None, torch.randn(6, inputs).to(dtype)):
                normed, total = kernels.rms_norm(x, norm_weight, 1e-5), x
                if residual is not None:
                    normed, total = kernels.add_rms_norm(x, residual, norm_weight, 1e-5)
                for gate, activation in (
                    (None, None),
                    ("silu", kernels.silu_and_mul),
                    ("gelu_tanh", kernels.gelu_and_mul),
                ):
                    if activation is not None and outputs % 2:
                        continue
                    want = product(normed, bias)
                    assert want is not None
                    result = product.after_norm(x, residual, (norm_weight, 1e-5), bias, gate)
                    assert result is not None and torch.equal(result[1], total)
                    assert torch.equal(result[0], want if activation is None else activation(want))
            for bad in (torch.inf, torch.nan):
                x[5, 40] = bad
                broken = product(x[5:], bias)
                assert broken is not None and not broken.isfinite().any()
            assert (
                product(x.half(), None) is None
                and product.after_norm(x, None, (norm_weight.double(), 0), None, None) is None
            )
    assert kernels.rounded_product(weight.codes, weight.scale.float(), None) is None
