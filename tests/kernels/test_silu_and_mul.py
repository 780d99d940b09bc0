"""The SwiGLU gate."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels.silu_and_mul import silu_and_mul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (7, 96), (0, 8)])
def test_gate_first_and_input_unchanged(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = torch.randn(shape).to(dtype)
    before = gate_up.clone()
    half = shape[1] // 2
    out = silu_and_mul(gate_up)
    assert torch.equal(out, F.silu(gate_up[:, :half]) * gate_up[:, half:])
    assert torch.equal(gate_up, before)
    assert out.is_contiguous()
