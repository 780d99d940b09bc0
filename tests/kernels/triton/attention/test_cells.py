"""Attention over a KV cache in codes, in Triton: every kernel against the reference, cells to the bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.cache_codes import CODES
from nanovllm.kernels.cascade import cascade_inputs
from nanovllm.kernels.paged_attention import paged_attention_reference
from nanovllm.kernels.qkv_rope_store import qkv_rope_store_reference
from nanovllm.runner.cascade_items import cut
from tests.attention.paged_cases import make_case
from tests.kernels.triton.attention.test_cascade import TREES, shared_case
from tests.kernels.triton.attention.test_paged_attention import check, decode, prefill
from tests.kernels.twins import DEVICE, DTYPES, INTERPRETED, TOLERANCE, load_twin, randn, relative_error, twin_test

cells = load_twin("attention.cells")
tiles, fused_decode = load_twin("attention.tiles"), load_twin("attention.fused_decode")
paged = load_twin("attention.paged_attention")
store = load_twin("attention.qkv_rope_store")
invariant = load_twin("batch_invariant.attention")
tl = pytest.importorskip("triton.language")
pytestmark = twin_test
LENGTHS = 1 if INTERPRETED else 10


def plain_numbers_of(codes: Any, q: Any) -> Any:
    """`cells.numbers_of` for the interpreter, which knows no assembly."""
    if codes.dtype == tl.uint8:
        bits = codes.to(tl.uint16)
        codes = (((bits & 128) << 8) | ((bits & 127) << 7)).to(tl.float16, bitcast=True) * 256.0
    return codes.to(q.dtype) if codes.dtype in (tl.float8e4nv, tl.int8, tl.float16) else codes


def plain_halves_of(words: Any, q: Any, dtype: Any) -> Any:
    """`cells.halves_of` likewise."""
    bits = words.to(tl.uint16, bitcast=True)
    byte = tl.int8 if dtype == tl.int8 else tl.uint8
    halves = ((bits & 255).to(tl.uint8), (bits >> 8).to(tl.uint8))
    return tuple(plain_numbers_of(half.to(byte, bitcast=True), q) for half in halves)


@pytest.fixture(params=["int8", "fp8", "fp8 as bytes"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kv_cache_dtype; also as GPUs see e4m3 that do not know it."""
    if INTERPRETED:
        monkeypatch.setattr(fused_decode, "numbers_of", plain_numbers_of)
        monkeypatch.setattr(tiles, "halves_of", plain_halves_of)
    if request.param == "fp8 as bytes":
        monkeypatch.setattr(cells, "has_fp8", lambda device: False)
    elif request.param == "fp8" and not cells.has_fp8(DEVICE):
        pytest.skip("this GPU does not know e4m3")
    return request.param.removesuffix(" as bytes")


@pytest.mark.parametrize(
    ("dtype", "window", "softcap", "head_dim", "block_size"),
    [(torch.float32, None, None, 64, 64), (DTYPES[-1], 40, None, 80, 16), (DTYPES[-1], None, 3.0, 128, 32)],
)
def test_mixed_batches(
    kind: str, dtype: torch.dtype, window: int | None, softcap: float | None, head_dim: int, block_size: int
) -> None:
    case = make_case(
        [1] * 4 + [2, 40 * LENGTHS, 1], [1, block_size + 1, 150 * LENGTHS, 64, 2, 110 * LENGTHS, 9],
        num_heads=6, num_kv_heads=2, head_dim=head_dim, block_size=block_size, dtype=dtype, layout="heads outside",
    )  # fmt: skip
    check(case.coded(kind), window, dtype, softcap, has_sinks=window is not None)


def test_tiles_loaded_whole(kind: str) -> None:
    case = make_case([1, 1, 40], [90, 32, 70], head_dim=64, block_size=32, dtype=torch.float16, layout="heads outside")
    configs = (decode.DecodeConfig(tile=32), prefill.PrefillConfig(tile=32))
    check(case.coded(kind), None, torch.float16, configs=configs)


def test_values_of_very_different_sizes(kind: str) -> None:
    """Weights are in float16, which has few exponents: where values are tiny they must not vanish there."""
    case = make_case([1, 1, 40], [90, 200, 70], head_dim=64, block_size=16, dtype=torch.float16, layout="heads outside")
    case = replace(case, kv_cache=case.kv_cache.float())
    sizes = torch.logspace(-6, 2, case.kv_cache.shape[3])
    case.kv_cache[1] *= sizes[:, None] * torch.logspace(-6, 0, 2).view(2, 1, 1)  # by token, by head
    check(case.coded(kind), None, torch.float16)


@pytest.mark.parametrize(
    ("dtype", "window", "softcap", "head_dim", "has_more"),
    [(DTYPES[-1], None, None, 64, True), (torch.float32, 40, 3.0, 80, False)],
)
def test_decodes_from_the_qkv_product(
    kind: str, dtype: torch.dtype, window: int | None, softcap: float | None, head_dim: int, has_more: bool
) -> None:
    """The cells are those of the reference to the bit, where rounding before them allows."""
    lengths = [1, 64, 65, 17, 130 * LENGTHS, 0]
    case = make_case(
        [1] * 6, [max(n, 1) for n in lengths], num_heads=4, num_kv_heads=2, head_dim=head_dim, block_size=16,
        dtype=dtype, layout="heads outside",
    )  # fmt: skip
    case = case.coded(kind).to(DEVICE)
    case.meta.seq_lens[-1], case.meta.slot_mapping[-1] = 0, -1  # padding
    case.poison_unused()
    assert case.scales is not None
    qkv = randn(6, 8 * head_dim, dtype=dtype)
    norm = torch.rand(head_dim, device=DEVICE).to(dtype) if has_more else None
    cos_sin = torch.rand(6, head_dim, device=DEVICE) if has_more else None
    heads = HeadInputs(cos_sin, case.meta.slot_mapping, norm, norm, 1e-6)
    shape, plans = case.shape(0.2, window, softcap), paged.StepPlans()
    want_cache = LayerCache(case.kv_cache.clone(), case.scales.clone())
    q = qkv_rope_store_reference(qkv, heads, want_cache, shape)
    want = paged_attention_reference(q.float(), want_cache, case.meta, shape)
    for _ in range(2):  # the second time, as a later layer
        got = paged.decode_qkv_triton(qkv, heads, case.cache, case.meta, shape, plans)
        assert relative_error(got[:-1], want[:-1]) < 2 * TOLERANCE[dtype] + (has_more and 0.01)
        assert not got[-1].any()
    if not has_more:
        assert torch.equal(case.kv_cache.view(torch.int8), want_cache.data.view(torch.int8))
        assert want_cache.scales is not None and torch.equal(
            case.scales.view(torch.int16), want_cache.scales.view(torch.int16)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_cells_are_those_of_the_reference(kind: str, dtype: torch.dtype) -> None:
    """To the bit, and no other cell is written: rows of all sizes, zeros, padding."""
    shape, slots = AttentionShape(6, 2, 48, scale=1.0), torch.randperm(64)[:40].to(DEVICE)
    slots[::7] = -1
    exponents = torch.linspace(-30, 30, 40) if dtype != torch.float16 else torch.linspace(-4, 3, 40)
    qkv = (torch.randn(40, 10 * 48) * 10 ** exponents[:, None]).to(dtype).to(DEVICE)
    qkv[9] = 0
    caches = [
        LayerCache(
            torch.full((2, 8, 2, 8, 48), 7.0).to(CODES[kind]).to(DEVICE),
            torch.full((8, 2, 8, 2), 7.0, dtype=torch.bfloat16, device=DEVICE),
        )
        for _ in range(2)
    ]
    heads = HeadInputs(None, slots)
    store.qkv_rope_store_triton(qkv, heads, caches[0], shape)
    qkv_rope_store_reference(qkv, heads, caches[1], shape)
    got, want = caches
    assert got.scales is not None and want.scales is not None and torch.equal(got.scales, want.scales)
    assert torch.equal(got.data.view(torch.int8), want.data.view(torch.int8))


def test_shared_prefixes(kind: str) -> None:
    case = shared_case(
        TREES["two levels"], [1, 64, 65, 7, 100, 30], num_heads=4, num_kv_heads=2, head_dim=64, block_size=64,
        dtype=torch.float16, layout="heads outside",
    ).coded(kind)  # fmt: skip
    words = torch.from_numpy(cut(TREES["two levels"], 6, 2, 2, 40)).to(DEVICE)
    meta, shape = replace(case.meta, cascade=cascade_inputs(words, 6)), case.shape(0.2)
    want = paged_attention_reference(case.q.float(), case.cache, meta, shape)
    got = paged.paged_attention_triton(case.q, case.cache, meta, shape)
    assert relative_error(got, want) < TOLERANCE[torch.float16]


def test_a_token_is_the_same_in_any_batch(kind: str) -> None:
    """With the batch-invariant kernel, to the bit."""
    case = make_case([1, 30, 5], [40, 70, 5], head_dim=64, block_size=16, dtype=torch.float16, layout="heads outside")
    case = case.coded(kind).to(DEVICE)
    shape = case.shape(0.2)
    out = invariant.batch_invariant_attention_triton(case.q, case.cache, case.meta, shape)
    want = paged_attention_reference(case.q.float(), case.cache, case.meta, shape)
    assert relative_error(out, want) < TOLERANCE[torch.float16]
    meta = replace(
        case.meta, query_start_loc=torch.tensor([0, 30], dtype=torch.int32, device=DEVICE),
        seq_lens=case.meta.seq_lens[1:2], block_table=case.meta.block_table[1:2].contiguous(), num_decodes=0,
        num_reqs=1, query_lens_host=[30], seq_lens_host=[70],
    )  # fmt: skip
    assert torch.equal(invariant.batch_invariant_attention_triton(case.q[1:31], case.cache, meta, shape), out[1:31])
