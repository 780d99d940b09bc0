"""RMS norm: its rounding, its purity."""

import pytest
import torch

from nanovllm.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def hugging_face_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula of Hugging Face's Llama and Qwen3, written out."""
    values = x.to(torch.float32)
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return weight * values.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 576), (5, 7), (3, 4, 96), (0, 16)])
def test_equals_hugging_face_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert torch.equal(rms_norm_reference(x, weight, 1e-5), hugging_face_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 576), (5, 7), (3, 4, 96), (70, 2048), (0, 16)])
def test_cpu_path_equals_the_reference(dtype: torch.dtype, scale: float, shape: tuple[int, ...]) -> None:
    """One rounding step of the dtype at most: the CPU's sums are in another order."""
    x, residual = (torch.randn(shape) * scale).to(dtype), (torch.randn(shape) * scale).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    ulp = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), atol=1e-6, rtol=ulp)
    for out, expected in zip(
        add_rms_norm(x, residual, weight, 1e-5), add_rms_norm_reference(x, residual, weight, 1e-5), strict=True
    ):
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=ulp)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_unchanged(dtype: torch.dtype) -> None:
    """No dtype is normed in place, float32 (where `.float()` copies nothing) least of all."""
    x, residual, weight = torch.randn(4, 64).to(dtype), torch.randn(4, 64).to(dtype), torch.randn(64).to(dtype)
    before = x.clone(), residual.clone(), weight.clone()
    rms_norm(x, weight, 1e-6)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    assert all(torch.equal(now, then) for now, then in zip((x, residual, weight), before, strict=True))
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, 1e-6))
    assert total.data_ptr() not in (x.data_ptr(), residual.data_ptr())


def test_strided_input() -> None:
    qkv = torch.randn(6, 10, 32)
    heads = qkv[:, 2:5]
    weight = torch.randn(32)
    assert torch.equal(rms_norm(heads, weight, 1e-6), rms_norm(heads.contiguous(), weight, 1e-6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_may_be_float32(dtype: torch.dtype) -> None:
    """As where an offset was added to them: the result has the input's dtype."""
    x, residual, weight = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype), 1 + 0.01 * torch.randn(64)
    exact = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * weight
    for norm, add_norm in ((rms_norm, add_rms_norm), (rms_norm_reference, add_rms_norm_reference)):
        normed = norm(x, weight, 1e-6)
        assert normed.dtype == dtype
        torch.testing.assert_close(normed.float(), exact, atol=0, rtol=2 * torch.finfo(dtype).eps)
        assert add_norm(x, residual, weight, 1e-6)[0].dtype == dtype
