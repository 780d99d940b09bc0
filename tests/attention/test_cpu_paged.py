"""The fast CPU paths, PyTorch's and C++'s, equal the reference, on every shape of batch."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.attention import cpu_batched_decode
from nanovllm.attention.cpu_paged import CpuPagedBackend
from nanovllm.kernels.cache_codes import CODES
from nanovllm.kernels.cpu.cpu_kernels import load_cpu_kernels
from nanovllm.kernels.paged_attention import paged_attention_reference
from tests.attention.paged_cases import LAYOUTS, PagedCase, make_case, make_metadata

HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))


def check(
    case: PagedCase,
    window: int | None,
    tolerance: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    shape = case.shape(case.q.shape[2] ** -0.5, window, softcap)
    expected = paged_attention_reference(case.q, case.cache, case.meta, shape, sinks)
    for native in (None, load_cpu_kernels()) if HAS_COMPILER else (None,):
        backend = CpuPagedBackend(native)
        prepared = backend.prepare(case.meta)
        for _layer in range(2):  # the second layer reuses the first one's indices
            out = backend.forward(shape, case.q, case.cache, prepared, sinks)
            assert out.shape == case.q.shape and out.dtype == case.q.dtype
            torch.testing.assert_close(out.float(), expected.float(), atol=tolerance, rtol=tolerance)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """query_lens and seq_lens: some decodes, then some prompts or chunks of prompts."""
    decodes = draw(st.lists(st.integers(1, 200), max_size=9))
    prompts = draw(
        st.lists(st.tuples(st.integers(1, 20), st.integers(0, 40)), min_size=0 if decodes else 1, max_size=4)
    )
    return [1] * len(decodes) + [n for n, _ in prompts], decodes + [n + past for n, past in prompts]


@settings(max_examples=30, deadline=None)
@given(
    lens=batches(),
    window=st.sampled_from([None, 1, 7, 40]),
    softcap=st.sampled_from([None, 0.8]),
    has_sinks=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    block_size=st.sampled_from([8, 16]),
    kind=st.sampled_from([None, *CODES]),
    seed=st.integers(0, 9),
)
def test_ragged_batches(
    lens: tuple[list[int], list[int]],
    window: int,
    softcap: float | None,
    has_sinks: bool,
    layout: str,
    block_size: int,
    kind: str | None,
    seed: int,
) -> None:
    sinks = torch.linspace(-3, 2, 6) if has_sinks else None
    check(make_case(*lens, layout=layout, block_size=block_size, seed=seed).coded(kind), window, 1e-5, softcap, sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 64), (7, 1, 80), (14, 2, 96), (4, 4, 128)])
def test_dtypes_and_head_shapes(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    case = make_case([1] * 6 + [5, 5, 9], [3, 30, 1, 77, 16, 17, 5, 5, 30], num_heads=heads, num_kv_heads=kv_heads,
                     head_dim=dim, dtype=dtype)  # fmt: skip
    check(case, None, 1e-5 if dtype == torch.float32 else 2e-2)


def test_long_beside_short() -> None:
    """Very unequal lengths fall into buckets of their own."""
    check(make_case([1] * 8, [500, 1, 2, 3, 90, 100, 8, 9]), None, 1e-5)


def test_shared_prefix_blocks() -> None:
    """Two requests may read one block (prefix cache): then pairs are more than blocks."""
    case = make_case([1] * 5, [24, 20, 30, 8, 16])
    table = case.meta.block_table.clone()
    table[1:4, 0] = table[0, 0]
    meta = make_metadata([1] * 5, case.meta.seq_lens_host, table, case.meta.slot_mapping)
    check(PagedCase(case.q, case.kv_cache, meta, []), None, 1e-5)


@pytest.mark.parametrize("unused_share", [0.0, 100.0])
def test_in_place_and_copied_blocks_agree(unused_share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_batched_decode, "MAX_UNUSED_SHARE", unused_share)
    check(make_case([1] * 7 + [3], [9, 33, 40, 41, 48, 64, 65, 3], layout="heads outside"), 50, 1e-5)


def test_queries_may_be_strided() -> None:
    case = make_case([1] * 5 + [4], [7, 9, 20, 30, 1, 6])
    wide = torch.cat((case.q, torch.randn(case.q.shape[0], 3, 16)), dim=1)
    check(PagedCase(wide[:, :6], case.kv_cache, case.meta, []), None, 1e-5)


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_decodes_of_a_mixed_batch_are_those_of_a_decode_batch() -> None:
    """The C++ kernel takes the decodes of any batch; their bits do not depend on the other requests."""
    mixed = make_case([1] * 3 + [6], [40, 7, 90, 11], layout="heads outside", dtype=torch.bfloat16)
    backend = CpuPagedBackend(load_cpu_kernels())
    out = backend.forward(mixed.shape(0.25), mixed.q, mixed.cache, backend.prepare(mixed.meta))
    for i in range(3):
        meta = make_metadata([1], mixed.meta.seq_lens_host[i : i + 1], mixed.meta.block_table[i : i + 1],
                             mixed.meta.slot_mapping[i : i + 1])  # fmt: skip
        alone = backend.forward(mixed.shape(0.25), mixed.q[i : i + 1], mixed.cache, backend.prepare(meta))
        assert torch.equal(alone, out[i : i + 1])
