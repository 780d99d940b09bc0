"""Rotary embedding in the half-split form."""

import pytest
import torch

from nanovllm.kernels.rope import apply_rope_reference


def random_cos_sin(num_tokens: int, head_dim: int) -> torch.Tensor:
    angles = torch.rand(num_tokens, head_dim // 2) * 100
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 2), (5, 9, 64), (3, 7, 80)])
def test_rotates_as_complex_numbers(dtype: torch.dtype, tokens: int, heads: int, head_dim: int) -> None:
    x, cos_sin = torch.randn(tokens, heads, head_dim).to(dtype), random_cos_sin(tokens, head_dim)
    before = x.clone()
    real, imag = x.double().chunk(2, dim=-1)
    cos, sin = cos_sin.double().chunk(2, dim=-1)
    expected = torch.complex(real, imag) * torch.complex(cos, sin)[:, None]
    out = apply_rope_reference(x, cos_sin)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        out.double(), torch.cat((expected.real, expected.imag), -1), atol=tolerance, rtol=tolerance
    )
    assert torch.equal(x, before)


def test_strided_input() -> None:
    qkv, cos_sin = torch.randn(4, 8, 16), random_cos_sin(4, 16)
    assert torch.equal(
        apply_rope_reference(qkv[:, 2:5], cos_sin), apply_rope_reference(qkv[:, 2:5].contiguous(), cos_sin)
    )


def test_position_zero_is_the_identity() -> None:
    x = torch.randn(2, 3, 8)
    assert torch.equal(apply_rope_reference(x, torch.tensor([1.0] * 4 + [0.0] * 4).expand(2, 8)), x)
