"""Attention over latents in Triton, its products and the store before it, against their references."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels.attention_types import HeadInputs, LayerCache
from nanovllm.kernels.cache_codes import CODES, encode_latents
from nanovllm.kernels.head_linear import head_linear
from nanovllm.kernels.latent_store import latent_store_reference, stored_rows
from nanovllm.kernels.paged_attention import paged_attention_reference
from tests.attention.paged_cases import PagedCase, make_case
from tests.kernels.triton.attention.test_cells import plain_numbers_of
from tests.kernels.twins import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    TOLERANCE,
    in_each_dtype,
    load_twin,
    randn,
    relative_error,
    twin_test,
)

names = "attention", "whole", "store", "few", "decode", "tiles"
attention, whole, store, few, decode, tiles = (load_twin(f"attention.latent_{name}") for name in names)
product = load_twin("linear.head_linear")
pytestmark = twin_test


def latents(
    query_lens: list[int], seq_lens: list[int], num_heads: int, rank: int, rope_dim: int, kind: str | None = None,
    **sizes: object,
) -> PagedCase:  # fmt: skip
    """A cache of rows that are keys, whose first numbers are values; NaN wherever no token is. kind: a kv_cache_dtype;
    the parts of a row are of very different sizes then."""
    case = make_case(query_lens, seq_lens, num_heads=num_heads, num_kv_heads=1, head_dim=rank + rope_dim, **sizes)  # type: ignore[arg-type]
    case = replace(case, kv_cache=case.kv_cache[:1])
    if kind is not None:
        rows = case.kv_cache[0] * torch.cat((torch.full((rank,), 0.01), torch.full((rope_dim,), 4.0)))
        codes, scales = encode_latents(rows, rank, CODES[kind])
        case = replace(case, kv_cache=codes[None].contiguous(), scales=scales.contiguous())
    case.poison_unused()
    return case.to(DEVICE)


def reference(case: PagedCase, rank: int) -> torch.Tensor:
    shape = case.shape(0.2)._replace(value_dim=rank)
    cache = LayerCache(case.kv_cache.float()) if case.scales is None else case.cache
    return paged_attention_reference(case.q.float(), cache, case.meta, shape)


@pytest.mark.parametrize(
    ("num_heads", "rank", "rope_dim", "block_size", "kind", "dtype"),
    in_each_dtype(
        [(4, 32, 16, 32, None), (20, 48, 8, 16, None), (40, 16, 16, 64, None), (20, 48, 8, 16, "fp8")]
        + ([] if INTERPRETED else [(16, 512, 64, 64, kind) for kind in (None, "fp8", "int8")])
    ),
)
def test_mixed_batches(
    num_heads: int,
    rank: int,
    rope_dim: int,
    block_size: int,
    kind: str | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Padding; more heads than one program takes; sizes that are no powers of two; two layers with one plan; codes."""
    if INTERPRETED:
        monkeypatch.setattr(tiles, "numbers_of", plain_numbers_of)
    case = latents(
        [1, 1, 1, 1, 30, 2], [1, block_size + 1, 9, 80, 30, 45], num_heads, rank, rope_dim, kind,
        block_size=block_size, dtype=dtype,
    )  # fmt: skip
    case.meta.seq_lens[2] = 0
    case.meta.block_table[2] = 1_000_000
    shape, plans = case.shape(0.2)._replace(value_dim=rank), attention.LatentPlans()
    want = reference(case, rank)
    for _ in range(2):  # the second time, as a later layer
        got = attention.latent_attention_triton(case.q, case.cache, case.meta, shape, plans)
        assert got.shape == want.shape and got.dtype == dtype
        assert relative_error(got, want) < TOLERANCE[dtype]
        assert not got[2].any()


@pytest.mark.parametrize(
    ("num_heads", "sizes", "block_size", "dtype"),
    in_each_dtype(
        [(4, (24, 40, 32, 16), 32), (20, (16, 24, 48, 8), 16)]
        + ([] if INTERPRETED else [(16, (128, 128, 512, 64), 64)])
    ),
)
@pytest.mark.parametrize("seq_lens", [[1], [300], [40, 1, 200]])
def test_a_few_decodes_from_products_to_products(
    num_heads: int, sizes: tuple[int, int, int, int], block_size: int, dtype: torch.dtype, seq_lens: list[int]
) -> None:
    """Norm, rotation, store, both products and attention; an item that one program has, and what many leave of one; a
    row of padding."""
    key_dim, value_dim, rank, rope_dim = sizes
    n = len(seq_lens)
    case = latents([1] * n, seq_lens, num_heads, rank, rope_dim, block_size=block_size, dtype=dtype)
    if n > 1:
        case.meta.seq_lens[1] = 0
        case.meta.slot_mapping[1] = -1
    q = randn(n, num_heads, key_dim + rope_dim, dtype=dtype)
    q, q_rope = q[..., :key_dim], q[..., key_dim:]
    kv, matrix = (
        randn(n, 8 + rank + rope_dim, dtype=dtype)[:, 8:],
        randn(num_heads, key_dim + value_dim, rank, dtype=dtype),
    )
    matrix = (matrix / 8).contiguous()
    heads = HeadInputs(
        randn(n, rope_dim, dtype=torch.float32), case.meta.slot_mapping.to(DEVICE), None, randn(rank, dtype=dtype), 1e-6
    )
    # A model's scale: where one key has most of the weight, rounded scores are what is compared.
    shape, want_cache = case.shape((rank + rope_dim) ** -0.5)._replace(value_dim=rank), case.kv_cache.clone()
    queries = torch.empty(n, num_heads, rank + rope_dim, dtype=dtype, device=DEVICE)
    queries[..., :rank] = head_linear(q.cpu().float(), matrix[:, :key_dim].cpu().float()).to(DEVICE)
    latent_store_reference(queries[..., rank:], q_rope, kv, heads, LayerCache(want_cache), False)
    found = paged_attention_reference(queries.float(), LayerCache(want_cache.float()), case.meta, shape)
    want = head_linear(found.cpu(), matrix[:, key_dim:].transpose(1, 2).cpu().float()).flatten(1).to(DEVICE)
    plan = decode.plan_latent_decode(case.meta, queries[..., :rank], case.cache)
    for is_settled in (False, True):  # the second time, as a later layer
        got_queries = few.query_few(q, q_rope, kv, heads, matrix, case.cache, False)
        got = few.attend_few(got_queries, matrix, case.cache, case.meta, shape, plan, key_dim, is_settled)
        assert relative_error(got_queries, queries) < TOLERANCE[dtype]
        assert relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES[-1:])
def test_exact_attention_has_the_same_bits_alone(dtype: torch.dtype) -> None:
    """A decode, and a chunk of a prompt, beside others and by themselves."""
    case = latents([1, 1, 20], [70, 9, 41], 4, 32, 16, block_size=16, dtype=dtype)
    shape = case.shape(0.2)._replace(value_dim=32)
    got = attention.latent_attention_triton(
        case.q, case.cache, case.meta, shape, attention.LatentPlans(), is_exact=True
    )
    assert relative_error(got, reference(case, 32)) < TOLERANCE[dtype]
    for req, rows, query_len in ((0, slice(0, 1), 1), (2, slice(15, 22), 7)):
        alone = replace(
            case.meta,
            query_start_loc=torch.tensor([0, query_len], dtype=torch.int32, device=DEVICE),
            seq_lens=case.meta.seq_lens[req : req + 1],
            block_table=case.meta.block_table[req : req + 1],
            num_decodes=int(query_len == 1),
            num_reqs=1,
            query_lens_host=[query_len],
        )
        one = attention.latent_attention_triton(
            case.q[rows], case.cache, alone, shape, attention.LatentPlans(), is_exact=True
        )
        assert torch.equal(one, got[rows])


@pytest.mark.parametrize(
    ("key_dim", "rope_dim", "value_dim", "dtype"),
    in_each_dtype([(24, 16, 40)] + ([] if INTERPRETED else [(128, 64, 128), (192, 64, 256)])),
)
def test_whole_prompts(key_dim: int, rope_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    """Each head with keys and values of its own beside a part of the key that is shared; rows behind the last one."""
    lens, num_heads = ([5, 40, 1, 33] if INTERPRETED else [5, 400, 1, 2000, 129]), 3
    meta = make_case(lens, lens, head_dim=16).meta
    meta = replace(meta, query_start_loc=meta.query_start_loc.to(DEVICE), seq_lens=meta.seq_lens.to(DEVICE))
    num_tokens = sum(lens) + 2
    q = randn(num_tokens, num_heads, key_dim + rope_dim, dtype=dtype)
    kv, k_rope = (
        randn(num_tokens, num_heads, key_dim + value_dim, dtype=dtype),
        randn(num_tokens, 40 + rope_dim, dtype=dtype),
    )
    parts = q[..., :key_dim], q[..., key_dim:], kv, k_rope[:, 40:]
    scale = (key_dim + rope_dim) ** -0.5
    got = whole.attend_whole(*parts, scale, meta, whole.plan_whole(meta, parts[0]))
    keys = torch.cat((kv[..., :key_dim], parts[3][:, None].expand(-1, num_heads, -1)), dim=-1)
    start = 0
    for length in lens:
        rows = slice(start, start + length)
        one = (x[rows].float().transpose(0, 1) for x in (q, keys, kv[..., key_dim:]))
        want = F.scaled_dot_product_attention(*one, is_causal=True, scale=scale).transpose(0, 1)
        assert relative_error(got[rows], want) < TOLERANCE[dtype]
        start += length
    assert not got[start:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("is_neox", "has_rotation"), [(False, True), (True, True), (True, False)])
def test_store_equals_reference(dtype: torch.dtype, is_neox: bool, has_rotation: bool) -> None:
    """Also: rows of padding, and everything else in the cache and in the queries, stay as they were."""
    num_tokens, num_heads, rank, rope_dim = 5, 3, 40, 16
    queries, cache = randn(num_tokens, num_heads, rank + rope_dim, dtype=dtype), randn(1, 3, 1, 8, 56, dtype=dtype)
    want_queries, want_cache = queries.clone(), cache.clone()
    turned, want_turned = queries[..., rank:], want_queries[..., rank:]
    q_rope = randn(num_tokens, num_heads, 12 + rope_dim, dtype=dtype)[..., 12:]
    kv = randn(num_tokens, 7 + rank + rope_dim, dtype=dtype)[:, 7:]
    cos_sin = randn(num_tokens, rope_dim, dtype=torch.float32) if has_rotation else None
    slots = torch.tensor([3, -1, 20, 7, -1], dtype=torch.int32, device=DEVICE)
    heads = HeadInputs(cos_sin, slots, k_norm_weight=randn(rank, dtype=dtype), eps=1e-6)
    store.latent_store_triton(turned, q_rope, kv, heads, LayerCache(cache), is_neox)
    latent_store_reference(want_turned, q_rope, kv, heads, LayerCache(want_cache), is_neox)
    assert relative_error(queries, want_queries) < TOLERANCE[dtype]
    assert relative_error(cache, want_cache) < TOLERANCE[dtype]
    assert torch.equal(queries[..., :rank], want_queries[..., :rank])
    assert torch.equal(cache[0, 1], want_cache[0, 1])


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", DTYPES[-1:])
def test_codes_are_stored_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    """Without rotation, so that all that is rounded is the norm; what is read of rows by themselves is near them."""
    num_tokens, rank, rope_dim = 5, 40, 16
    slots = torch.tensor([3, -1, 20, 7, -1], dtype=torch.int32, device=DEVICE)
    heads = HeadInputs(None, slots, k_norm_weight=torch.ones(rank, dtype=dtype, device=DEVICE), eps=0.0)
    kv = torch.sign(randn(num_tokens, rank + rope_dim, dtype=dtype)) / 4
    kv[:, rank:] = 30 * randn(num_tokens, rope_dim, dtype=dtype)
    q_rope = randn(num_tokens, 3, rope_dim, dtype=dtype)
    caches = [
        LayerCache(
            torch.zeros(1, 3, 1, 8, rank + rope_dim, dtype=CODES[kind], device=DEVICE),
            torch.zeros(3, 1, 8, 2, dtype=torch.bfloat16, device=DEVICE),
        )
        for _ in range(2)
    ]
    store.latent_store_triton(torch.empty_like(q_rope), q_rope, kv, heads, caches[0], False)
    latent_store_reference(torch.empty_like(q_rope), q_rope, kv, heads, caches[1], False)
    got, want = ((cache.data.view(torch.int8), cache.scales) for cache in caches)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    rows = stored_rows(caches[0], slots[[0, 2, 3]].long(), rank, dtype)
    parts = kv[[0, 2, 3], rank:].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
    assert relative_error(rows[:, :rank], 4 * kv[[0, 2, 3], :rank]) < 1e-3
    assert relative_error(rows[:, rank:], parts) < 0.04


@pytest.mark.parametrize("num_tokens", [0, 1, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_for_each_head(dtype: torch.dtype, num_tokens: int) -> None:
    """A matrix either way round; rows of inputs and of results that lie apart; each row with the bits it has alone."""
    x, weight = randn(num_tokens, 3, 2, 40, dtype=dtype)[:, :, 1], randn(3, 40, 72, dtype=dtype)
    wide = torch.zeros(num_tokens, 3, 80, dtype=dtype, device=DEVICE)
    assert product.head_linear_triton(x, weight, wide[..., :72]).data_ptr() == wide.data_ptr()
    assert not wide[..., 72:].any()
    want = head_linear(x.cpu().float(), weight.cpu().float()).to(DEVICE)
    turned = product.head_linear_triton(x, weight.transpose(1, 2).contiguous().transpose(1, 2), None)
    for got in (wide[..., :72], turned):
        assert got.shape == want.shape
        assert num_tokens == 0 or relative_error(got, want) < TOLERANCE[dtype]
    if num_tokens:
        assert torch.equal(product.head_linear_triton(x[-1:], weight, None), wide[-1:, :, :72])
