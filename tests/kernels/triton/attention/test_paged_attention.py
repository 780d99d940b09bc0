"""Triton paged attention, decode and prefill, against the reference on ragged batches."""

import random
from typing import Any

import pytest
import torch

from nanovllm.kernels.attention_types import AttentionShape, HeadInputs, LayerCache
from nanovllm.kernels.paged_attention import paged_attention_reference
from nanovllm.kernels.qkv_rope_store import qkv_rope_store_reference
from tests.attention.paged_cases import LAYOUTS, PagedCase, make_case
from tests.kernels.twins import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    TOLERANCE,
    in_each_dtype,
    load_twin,
    relative_error,
    twin_test,
)

twin = load_twin("attention.paged_attention")
decode, prefill, tiles = (
    load_twin("attention.decode_plan"),
    load_twin("attention.prefill"),
    load_twin("attention.tiles"),
)
pytestmark = twin_test

LENGTHS = 1 if INTERPRETED else 10  # the interpreter takes a hundred times longer


def planned(case: PagedCase, window: int | None, decodes: Any, prefills: Any) -> Any:
    """Plans of a step with configurations of the caller's choice.

    They are written before what follows is queued: whoever finds a plan takes it for one that a layer has used.
    """
    meta, plans = case.meta, twin.StepPlans()
    plans.decode[window] = decode.plan_decode(
        meta.seq_lens[: meta.num_decodes], meta.block_table, case.q, case.cache, window, decodes
    )
    plans.prefill[False] = prefill.plan_prefill(
        meta.query_start_loc, meta.seq_lens, meta.num_decodes, case.q, case.cache, prefills
    )
    if not INTERPRETED:
        torch.cuda.synchronize()
    return plans


def sinks_of(shape: AttentionShape) -> torch.Tensor:
    return torch.linspace(-3, 4, shape.num_heads, device=DEVICE)


def check(
    case: PagedCase,
    window: int | None,
    dtype: torch.dtype,
    softcap: float | None = None,
    configs: tuple[Any, Any] | None = None,
    has_sinks: bool = False,
) -> None:
    case = case.to(DEVICE)
    case.poison_unused()
    shape = case.shape(case.q.shape[2] ** -0.5, window, softcap)
    plans = planned(case, window, *configs) if configs else None
    sinks = sinks_of(shape) if has_sinks else None
    got = twin.paged_attention_triton(case.q, case.cache, case.meta, shape, plans, sinks)
    cache = LayerCache(case.kv_cache.float()) if case.scales is None else case.cache
    want = paged_attention_reference(case.q.float(), cache, case.meta, shape, sinks)
    assert got.shape == case.q.shape and got.dtype == dtype
    assert relative_error(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype"),
    in_each_dtype(
        [
            (4, 2, 128, 64),
            (9, 3, 64, 64),
            (4, 4, 80, 16),
            (7, 1, 96, 32),
            (2, 1, 256, 64),
            (20, 1, 32, 128),
            (4, 2, 8, 16),
        ]
    ),
)
def test_mixed_batches(
    window: int | None, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    rng = random.Random(head_dim)
    decodes = [1, block_size, block_size + 1, rng.randint(2, 300) * LENGTHS]
    query_lens = [2, rng.randint(2, 40) * LENGTHS, 1]
    cached = [0, rng.randint(1, 100) * LENGTHS, block_size]
    case = make_case(
        [1] * len(decodes) + query_lens,
        decodes + [a + b for a, b in zip(query_lens, cached, strict=True)],
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype,
    )  # fmt: skip
    check(case, window, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("head_dim", "softcap"), [(256, 50.0), (80, 0.7), (64, 3.0)])
def test_soft_caps(dtype: torch.dtype, window: int | None, head_dim: int, softcap: float) -> None:
    """As Gemma 2 has them, on layers with and without a window."""
    case = make_case([1, 1, 1, 30, 7], [1, 90, 200, 70, 7], num_heads=4, head_dim=head_dim, block_size=16, dtype=dtype)
    check(case, window, dtype, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_very_wide_heads(dtype: torch.dtype) -> None:
    """As Gemma 4's layers that see everything have them, in a cache whose blocks hold more than one layer's."""
    case = make_case(
        [1, 1, 40], [90, 7, 70], num_heads=4, num_kv_heads=1, head_dim=512, block_size=16, dtype=dtype,
        layout="k and v adjacent",
    )  # fmt: skip
    check(case, None, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (None, 3.0)])
def test_sinks(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    """Once for each head, also where a request is cut into parts, in decodes and in prompts of several tiles."""
    case = make_case(
        [1, 1, 1, 90, 7], [1, 90, 700, 130, 7], num_heads=6, num_kv_heads=2, head_dim=64, block_size=16, dtype=dtype
    )
    check(case, window, dtype, softcap, has_sinks=True)


@pytest.mark.parametrize(
    ("window", "softcap", "has_norm", "has_rotation"),
    [(None, None, True, True), (2, None, False, True), (40, None, True, False), (None, 3.0, False, False)],
)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "dtype"),
    in_each_dtype([(4, 2, 128, 64), (9, 3, 64, 16), (4, 4, 80, 16)]),
)
def test_decodes_from_the_qkv_product(
    window: int | None, softcap: float | None, has_norm: bool, has_rotation: bool,
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Equals the two kernels apart: what comes out, and what is in the cache. The new tokens' cells hold NaN before."""
    lengths = [1, 64, 65, block_size + 1, 130 * LENGTHS, 0]
    case = make_case(
        [1] * len(lengths), [max(n, 1) for n in lengths],
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype,
    ).to(DEVICE)  # fmt: skip
    case.meta.seq_lens[-1], case.meta.slot_mapping[-1] = 0, -1  # padding
    case.poison_unused()
    slots = case.meta.slot_mapping[:-1]
    case.kv_cache[:, slots // block_size, :, slots % block_size] = float("nan")
    qkv = torch.randn(len(lengths), (num_heads + 2 * num_kv_heads) * head_dim, device=DEVICE).to(dtype)
    cos_sin = torch.rand(len(lengths), head_dim, device=DEVICE) if has_rotation else None
    norms = [torch.rand(head_dim, device=DEVICE).to(dtype) if has_norm else None for _ in range(2)]
    want_cache = case.kv_cache.clone()
    shape, heads = case.shape(0.2, window, softcap), HeadInputs(cos_sin, case.meta.slot_mapping, *norms, 1e-6)
    q = qkv_rope_store_reference(qkv, heads, LayerCache(want_cache), shape)
    sinks = sinks_of(shape) if window == 40 or not has_rotation else None
    want = paged_attention_reference(q.float(), LayerCache(want_cache.float()), case.meta, shape, sinks)

    plans = twin.StepPlans()
    for _ in range(2):  # the second time, as a later layer
        got = twin.decode_qkv_triton(qkv, heads, case.cache, case.meta, shape, plans, sinks)
        assert relative_error(got, want) < TOLERANCE[dtype]
        stored, wanted = (c[:, slots // block_size, :, slots % block_size] for c in (case.kv_cache, want_cache))
        assert relative_error(stored, wanted.float()) < TOLERANCE[dtype]
        case.kv_cache[:, slots // block_size, :, slots % block_size] = float("nan")
    assert not got[-1].any()
    same = case.kv_cache.nan_to_num(7.0) == want_cache.nan_to_num(7.0)
    same[:, slots // block_size, :, slots % block_size] = True
    assert same.all(), "wrote beside the new tokens"


def test_which_steps_decode_from_the_qkv_product() -> None:
    assert twin.takes_qkv(make_case([1, 1], [5, 6]).meta, None)
    assert not twin.takes_qkv(make_case([1, 1, 3], [5, 6, 7]).meta, None)
    assert not twin.takes_qkv(make_case([1, 1], [5, 6]).meta, 1)
    assert twin.takes_qkv(make_case([1] * decode.FEW_REQUESTS, [5] * decode.FEW_REQUESTS).meta, None)
    assert not twin.takes_qkv(make_case([1] * (decode.FEW_REQUESTS + 1), [5] * (decode.FEW_REQUESTS + 1)).meta, None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_cache(layout: str) -> None:
    case = make_case([1, 1, 30], [50, 7, 90], head_dim=64, block_size=16, dtype=torch.float16, layout=layout)
    check(case, None, torch.float16)


@pytest.mark.parametrize("lengths", [[1], [500], [1] * 9, [300, 1, 2, 450, 64]])
def test_decodes_alone(lengths: list[int]) -> None:
    """Fewer tiles than programs, requests cut into many ranges, ranges that hold many requests."""
    lengths = [n * LENGTHS for n in lengths]
    check(make_case([1] * len(lengths), lengths, head_dim=64, block_size=64), None, torch.float32)


@pytest.mark.parametrize("query_lens", [[5], [33, 2, 64]])
def test_prefills_alone(query_lens: list[int]) -> None:
    check(make_case(query_lens, query_lens, head_dim=64, block_size=64), None, torch.float32)


def test_padding_gives_zeros() -> None:
    """Rows of length 0, whatever their table says, and rows beyond the last request."""
    case = make_case([1] * 5 + [4], [20, 1, 9, 1, 70, 10], head_dim=64, block_size=16).to(DEVICE)
    case.meta.seq_lens[[1, 3]] = 0
    case.meta.block_table[[1, 3]] = 1_000_000
    q = torch.cat((case.q, torch.full_like(case.q[:3], float("nan"))))
    got = twin.paged_attention_triton(q, case.cache, case.meta, case.shape(0.1))
    assert not got[[1, 3, 9, 10, 11]].any()
    want = paged_attention_reference(case.q, case.cache, case.meta, case.shape(0.1))
    assert relative_error(got[:9], want) < TOLERANCE[torch.float32]


def test_plans_serve_many_layers() -> None:
    """Partial results of one call leave nothing behind for the next."""
    case = make_case([1] * 3 + [20, 9], [300, 5, 150, 20, 50], head_dim=64, block_size=64).to(DEVICE)
    plans = twin.StepPlans()
    for layer in range(3):
        q = torch.randn_like(case.q) * (layer + 1)
        got = twin.paged_attention_triton(q, case.cache, case.meta, case.shape(0.1), plans)
        want = paged_attention_reference(q, case.cache, case.meta, case.shape(0.1))
        assert relative_error(got, want) < TOLERANCE[torch.float32]
    assert not plans.decode[None].semaphores.any()


@pytest.mark.parametrize("window", [None, 40, 100])
@pytest.mark.parametrize(("head_dim", "block_size", "layout", "dtype"), in_each_dtype([
    (64, 64, "heads outside"),
    (80, 32, "heads outside"),  # columns beyond the head
    (64, 64, "tokens outside"),  # not in one piece: pointers
    (64, 16, "heads outside"),
]))  # fmt: skip
def test_tiles_loaded_whole(
    window: int | None, head_dim: int, block_size: int, layout: str, dtype: torch.dtype
) -> None:
    case = make_case(
        [1] * 4 + [70, 2, 40], [1, 64, 65, 200, 70, 130, 104],
        head_dim=head_dim, block_size=block_size, dtype=dtype, layout=layout,
    )  # fmt: skip
    is_whole = layout == "heads outside" and block_size >= 32
    assert (tiles.tile_descriptor(case.kv_cache, 32) is not None) == (is_whole and tiles.has_tile_loads(DEVICE))
    configs = (
        decode.DecodeConfig(tile=32, num_stages=2, occupancy=1),
        prefill.PrefillConfig(rows=32, tile=32, num_stages=2, occupancy=1),
    )
    check(case, window, dtype, configs=configs)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_soft_caps_of_tiles_loaded_whole(softcap: float | None) -> None:
    case = make_case([1, 1, 40], [90, 32, 70], head_dim=64, block_size=32, dtype=torch.float16, layout="heads outside")
    configs = (decode.DecodeConfig(tile=32), prefill.PrefillConfig(tile=32))
    check(case, None, torch.float16, softcap, configs)


@pytest.mark.parametrize(("query_lens", "seq_lens"), [
    ([1, 1, 40, 3, 130, 16], [9, 70, 40, 900, 130, 16]),
    ([16, 16, 32], [16, 16, 32]),
    ([1, 5], [1, 5]),
])  # fmt: skip
def test_order_of_prompts(query_lens: list[int], seq_lens: list[int]) -> None:
    """Every tile of queries once, those with the most keys first, of equal ones the earlier request; then none."""
    case = make_case(query_lens, seq_lens, num_heads=4, num_kv_heads=2, head_dim=16, block_size=16).to(DEVICE)
    meta, tokens = case.meta, 8
    config = prefill.PrefillConfig(rows=2 * tokens, tile=16)
    plan = prefill.plan_prefill(meta.query_start_loc, meta.seq_lens, meta.num_decodes, case.q, case.cache, config)
    tiles_of_queries = [
        (-(seq_len - query_len + min(first + tokens, query_len)), req, first)
        for req, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True))
        if req >= meta.num_decodes
        for first in range(0, query_len, tokens)
    ]
    got = plan.order.tolist()
    assert got[: len(tiles_of_queries)] == [[req, first] for _, req, first in sorted(tiles_of_queries)]
    assert all(req == -1 for req, _ in got[len(tiles_of_queries) :])


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_graph_replays_with_other_lengths() -> None:
    """A captured step reads its lengths and blocks anew."""
    case = make_case([1] * 16, [random.Random(i).randint(1, 900) for i in range(16)], block_size=64).to(DEVICE)
    twin.paged_attention_triton(case.q, case.cache, case.meta, case.shape(0.2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = twin.paged_attention_triton(case.q, case.cache, case.meta, case.shape(0.2))
    for _ in range(3):
        graph.replay()
        want = paged_attention_reference(case.q, case.cache, case.meta, case.shape(0.2))
        assert relative_error(got, want) < TOLERANCE[torch.float32]
        case.meta.seq_lens.copy_((case.meta.seq_lens * torch.rand(16, device=DEVICE)).int())
