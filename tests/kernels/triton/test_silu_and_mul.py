"""The Triton gate against its reference."""

import pytest
import torch

from nanovllm.kernels.silu_and_mul import gelu_and_mul_reference, silu_and_mul_reference
from tests.kernels.twins import DTYPES, TOLERANCE, load_twin, randn, relative_error, twin_test

twin = load_twin("silu_and_mul")
pytestmark = twin_test


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (3, 2 * 1536), (5, 2 * 1025), (0, 8)])
@pytest.mark.parametrize("gelu", [False, True])
def test_equals_reference(dtype: torch.dtype, shape: tuple[int, int], gelu: bool) -> None:
    gate_up = randn(*shape, dtype=dtype) * 4
    want = (gelu_and_mul_reference if gelu else silu_and_mul_reference)(gate_up)
    assert relative_error(twin.silu_and_mul_triton(gate_up, gelu), want) < TOLERANCE[dtype]


def test_strided_rows() -> None:
    gate_up = randn(4, 3, 64, dtype=torch.float32)[:, 1]
    want = silu_and_mul_reference(gate_up)
    assert relative_error(twin.silu_and_mul_triton(gate_up), want) < TOLERANCE[torch.float32]


def test_large_gates_stay_finite() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 1.0, 2.0]], device=randn(1, dtype=torch.float32).device)
    for gelu in (False, True):
        assert twin.silu_and_mul_triton(gate_up, gelu).tolist() == [[0.0, 400.0]]
