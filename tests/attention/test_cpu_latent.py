"""Attention over latents by PyTorch's products equals the reference, whatever part of the scores is there at a time."""

from dataclasses import replace

import pytest
import torch

from nanovllm.attention import cpu_latent
from nanovllm.attention.cpu_latent import CpuLatentBackend
from nanovllm.kernels.paged_attention import paged_attention_reference
from tests.attention.paged_cases import make_case


@pytest.mark.parametrize("max_scores", [1, 300, cpu_latent.MAX_SCORES])
def test_ragged_batches(max_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes of equal and of other lengths, whole prompts and chunks; and layers that have values of their own."""
    monkeypatch.setattr(cpu_latent, "MAX_SCORES", max_scores)
    lens = [1, 1, 1, 4, 4, 17], [9, 9, 30, 4, 4, 40]
    case = make_case(*lens, num_heads=5, num_kv_heads=1, head_dim=24)
    backend = CpuLatentBackend()
    prepared = backend.prepare(case.meta)
    shape = case.shape(0.3)
    plain = backend.forward(shape, case.q, case.cache, prepared)
    torch.testing.assert_close(plain, paged_attention_reference(case.q, case.cache, case.meta, shape))
    shape, latents = shape._replace(value_dim=16), replace(case, kv_cache=case.kv_cache[:1])
    found = backend.forward(shape, case.q, latents.cache, prepared)
    assert found.shape == (28, 5, 16)
    torch.testing.assert_close(found, paged_attention_reference(case.q, latents.cache, case.meta, shape))
