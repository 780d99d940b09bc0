"""Norm, rotation and KV store in one Triton kernel, against the reference that composes them."""

import pytest
import torch

from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.qkv_rope_store import qkv_rope_store_reference
from tests.kernels.twins import DEVICE, DTYPES, TOLERANCE, load_twin, randn, relative_error, twin_test

twin = load_twin("attention.qkv_rope_store")
pytestmark = twin_test


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "norm", "rope"),
    [(16, 8, 128, True, True), (9, 3, 64, False, True), (4, 4, 80, True, False), (3, 1, 256, True, True),
     (6, 2, 96, False, False), (40, 8, 16, True, True)],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["heads outside", "tokens outside"])
def test_equals_reference(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, norm: bool, rope: bool, layout: str
) -> None:
    """Also: rows of padding (slot -1) and everything else in the cache stay as they were."""
    num_tokens, num_blocks, block_size = 7, 3, 16
    qkv = randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    cos_sin = randn(num_tokens, head_dim, dtype=torch.float32) if rope else None
    weights = [randn(head_dim, dtype=dtype) if norm else None for _ in range(2)]
    slots = torch.randperm(num_blocks * block_size)[:num_tokens].to(DEVICE)
    slots[::3] = -1
    if layout == "heads outside":
        cache = randn(2, num_blocks, num_kv_heads, block_size, head_dim, dtype=dtype)
    else:
        cache = randn(2, num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype).transpose(2, 3)
    want_cache = cache.clone()
    heads = HeadInputs(cos_sin, slots, *weights, 1e-6)
    shape = AttentionShape(num_heads, num_kv_heads, head_dim, scale=1.0)
    q = twin.qkv_rope_store_triton(qkv, heads, LayerCache(cache), shape)
    want_q = qkv_rope_store_reference(qkv, heads, LayerCache(want_cache), shape)
    assert q.shape == want_q.shape and q.dtype == dtype
    assert relative_error(q, want_q) < TOLERANCE[dtype]
    assert relative_error(cache, want_cache) < TOLERANCE[dtype]
    assert torch.equal(cache[1], want_cache[1])


def test_strided_rows_and_int32_slots() -> None:
    qkv = randn(5, 2, 4 * 32, dtype=torch.float32)[:, 1]
    cache, want_cache = (torch.zeros(2, 1, 1, 8, 32, device=DEVICE) for _ in range(2))
    slots = torch.tensor([3, -1, 0, 7, 1], dtype=torch.int32, device=DEVICE)
    heads, shape = HeadInputs(None, slots), AttentionShape(2, 1, 32, scale=1.0)
    q = twin.qkv_rope_store_triton(qkv, heads, LayerCache(cache), shape)
    want_q = qkv_rope_store_reference(qkv, heads, LayerCache(want_cache), shape)
    assert torch.equal(q, want_q) and torch.equal(cache, want_cache)


def test_no_tokens() -> None:
    cache = torch.zeros(2, 1, 1, 8, 32, device=DEVICE)
    slots = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    heads, shape = HeadInputs(None, slots), AttentionShape(2, 1, 32, scale=1.0)
    q = twin.qkv_rope_store_triton(torch.zeros(0, 128, device=DEVICE), heads, LayerCache(cache), shape)
    assert q.shape == (0, 2, 32)
