"""What must not depend on how a compiler tunes the C++ kernels for one CPU or another."""

import ctypes
from pathlib import Path

import pytest
import torch

from nanovllm.kernels.cpu import cpu_kernels
from tests.kernels.cpu.test_cpu_kernels import COMPILER, needs_compiler


@needs_compiler
@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="runs code for AVX2")
def test_a_rows_bits_are_its_own_however_a_compiler_tunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For some CPUs GCC leaves products and sums apart in some loops, if it is free to join them, and not in others."""
    monkeypatch.setattr(cpu_kernels, "_SOURCES", [Path(cpu_kernels.__file__).with_name("skinny_linear.cpp")])
    assert COMPILER is not None
    cpu_kernels.build(COMPILER, tmp_path / "tuned.so", "-march=x86-64-v3", "-mtune=znver3")
    signature = cpu_kernels._SIGNATURES["skinny_linear"]
    multiply = signature.in_dll(ctypes.CDLL(str(tmp_path / "tuned.so")), "skinny_linear_float32")

    def product(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(x), len(weight))
        multiply(x.data_ptr(), weight.data_ptr(), None, out.data_ptr(), len(x), x.stride(0), len(weight), x.shape[1])
        return out

    for num_outputs, num_inputs in ((1, 7), (5, 16), (48, 33), (61, 100)):
        x, weight = torch.randn(33, num_inputs), torch.randn(num_outputs, num_inputs)
        whole = product(x)
        for first, last in ((0, 2), (1, 10), (16, 33), (3, 20)):
            assert torch.equal(product(x[first:last]), whole[first:last])
