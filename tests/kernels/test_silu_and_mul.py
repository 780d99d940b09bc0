"""The gates of feed-forward layers."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels.silu_and_mul import gelu_and_mul, silu_and_mul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (7, 96), (0, 8)])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_gate_first_and_input_unchanged(gate: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = torch.randn(shape).to(dtype)
    before = gate_up.clone()
    half = shape[1] // 2
    if gate == "silu":
        out, active = silu_and_mul(gate_up), F.silu(gate_up[:, :half])
    else:
        out, active = gelu_and_mul(gate_up), F.gelu(gate_up[:, :half], approximate="tanh")
    assert torch.equal(out, active * gate_up[:, half:])
    assert torch.equal(gate_up, before)
    assert out.is_contiguous()
