"""The Triton rotation against its reference."""

import pytest
import torch

from nanovllm.kernels.rope import apply_rope_reference
from tests.kernels.twins import DTYPES, TOLERANCE, load_twin, randn, relative_error, twin_test

twin = load_twin("rope")
pytestmark = twin_test


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (5, 3, 80), (2, 9, 128), (0, 2, 16)])
def test_equals_reference(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    x, cos_sin = randn(*shape, dtype=dtype), randn(shape[0], shape[2], dtype=torch.float32)
    assert relative_error(twin.apply_rope_triton(x, cos_sin), apply_rope_reference(x, cos_sin)) < TOLERANCE[dtype]


def test_strided_heads() -> None:
    x, cos_sin = randn(4, 9, 32, dtype=torch.float32)[:, 2:7], randn(4, 32, dtype=torch.float32)
    want = apply_rope_reference(x, cos_sin)
    assert relative_error(twin.apply_rope_triton(x, cos_sin), want) < TOLERANCE[torch.float32]
