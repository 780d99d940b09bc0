"""Products from codes in C++ against the PyTorch reference: every form, in float32 and bfloat16."""

from collections.abc import Callable

import pytest
import torch

from nanovllm.kernels.cpu.cpu_kernels import CpuKernels, load_cpu_kernels
from nanovllm.kernels.quantized_linear import MAX_CPU_ROWS, dequantize_reference, quantized_linear
from tests.kernels.cpu.quantized_cases import check_products, check_rounded_products, random_weight
from tests.kernels.cpu.test_cpu_kernels import DTYPES, needs_compiler


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", [check_products, check_rounded_products])
def test_products(check: Callable[[CpuKernels, torch.dtype], None], dtype: torch.dtype) -> None:
    kernels = load_cpu_kernels()
    assert kernels is not None
    check(kernels, dtype)


@needs_compiler
@pytest.mark.parametrize("num_rows", [1, MAX_CPU_ROWS + 1])
def test_what_the_kernel_does_not_take(num_rows: int) -> None:
    """float16, groups that are no vectors, rows that are no neighbours in memory: the same product."""
    for dtype, size, stride in ((torch.float16, 32, 1), (torch.float32, 24, 1), (torch.float32, 32, 2)):
        weight = random_weight("int8", 10, 96, size, "zeros")
        x = torch.randn(num_rows, 96 * stride).to(dtype)[:, ::stride]
        want = x.float() @ dequantize_reference(weight, torch.float32).t()
        tolerance = 1e-2 if dtype == torch.float16 else 1e-4
        torch.testing.assert_close(quantized_linear(x, weight).float(), want, rtol=tolerance, atol=tolerance)
