"""From the QKV projection to the cache: every option, every layout, no write that was not asked for."""

import pytest
import torch

from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.qkv_rope_store import qkv_rope_store
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.rope import apply_rope_reference

NUM_BLOCKS, BLOCK_SIZE = 5, 4


def empty_cache(layout: str, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The logical shape [2, num_blocks, num_kv_heads, block_size, head_dim] in three physical orders."""
    if layout == "heads outside":
        return torch.zeros(2, NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim, dtype=dtype)
    if layout == "tokens outside":
        return torch.zeros(2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim, dtype=dtype).transpose(2, 3)
    return torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 2, num_kv_heads, head_dim, dtype=dtype).permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize("layout", ["heads outside", "tokens outside", "k and v adjacent"])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_composes_norm_rope_and_store(layout: str, rope: bool, norm: bool, dtype: torch.dtype) -> None:
    heads, kv_heads, dim = 6, 2, 8
    slots = [3, -1, 19, 0, 8]
    qkv = torch.randn(len(slots), (heads + 2 * kv_heads) * dim).to(dtype)
    before = qkv.clone()
    angles = torch.rand(len(slots), dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1) if rope else None
    q_weight, k_weight = (torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)) if norm else (None, None)
    cache = empty_cache(layout, kv_heads, dim, dtype)

    inputs = HeadInputs(cos_sin, torch.tensor(slots), q_weight, k_weight, 1e-6)
    q = qkv_rope_store(qkv, inputs, LayerCache(cache), AttentionShape(heads, kv_heads, dim, scale=1.0))

    want_q, want_k, want_v = qkv.view(len(slots), -1, dim).split((heads, kv_heads, kv_heads), dim=1)
    if q_weight is not None and k_weight is not None:
        want_q, want_k = rms_norm(want_q, q_weight, 1e-6), rms_norm(want_k, k_weight, 1e-6)
    if cos_sin is not None:
        want_q, want_k = apply_rope_reference(want_q, cos_sin), apply_rope_reference(want_k, cos_sin)
    want_cache = torch.zeros(2, NUM_BLOCKS, kv_heads, BLOCK_SIZE, dim, dtype=dtype)
    for token, slot in enumerate(slots):
        if slot >= 0:
            want_cache[0, slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = want_k[token]
            want_cache[1, slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = want_v[token]
    assert torch.equal(q, want_q)
    assert torch.equal(cache, want_cache)
    assert torch.equal(qkv, before)


def test_all_slots_negative_writes_nothing() -> None:
    cache = empty_cache("heads outside", 1, 8, torch.float32)
    slots = torch.full((3,), -1, dtype=torch.int32)
    shape = AttentionShape(1, 1, 8, scale=1.0)
    qkv_rope_store(torch.randn(3, 24), HeadInputs(None, slots), LayerCache(cache), shape)
    assert not cache.any()
