"""Random quantized weights in every form, and their products in C++ against float64."""

import torch

from nanovllm.kernels.cpu.cpu_kernels import CpuKernels
from nanovllm.kernels.quantized_linear import QuantizedWeight, dequantize_reference

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
