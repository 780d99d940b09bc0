"""Decodes that share prefixes, in Triton, against the reference, which knows nothing of sharing."""

from dataclasses import replace

import pytest
import torch

from nanovllm.engine.scheduler_output import SharedPrefix
from nanovllm.kernels.attention_types import LayerCache
from nanovllm.kernels.cascade import cascade_inputs
from nanovllm.kernels.paged_attention import paged_attention_reference
from nanovllm.runner.cascade_items import cut
from tests.attention.paged_cases import PagedCase, make_case
from tests.kernels.triton.attention.test_paged_attention import sinks_of
from tests.kernels.twins import DEVICE, DTYPES, TOLERANCE, load_twin, relative_error, twin_test

twin = load_twin("attention.paged_attention")
pytestmark = twin_test

TREES = {
    "siblings": [SharedPrefix(1, 3, 0, 128), SharedPrefix(4, 2, 0, 64)],
    "two levels": [SharedPrefix(0, 6, 0, 64), SharedPrefix(0, 2, 64, 128), SharedPrefix(3, 3, 64, 192)],
    "all alike": [SharedPrefix(0, 6, 0, 192)],
}


def shared_case(
    prefixes: list[SharedPrefix], own: list[int], query_lens: tuple[int, ...] = (), **shape: object
) -> PagedCase:
    """Decodes with `own` tokens behind the prefixes that they share, then prompts; on the device."""
    shared = [max([p.end for p in prefixes if p.first <= i < p.first + p.num_reqs], default=0) for i in range(len(own))]
    seq_lens = [a + b for a, b in zip(shared, own, strict=True)]
    case = make_case([1] * len(own) + list(query_lens), seq_lens + list(query_lens), **shape)  # type: ignore[arg-type]
    block_size = case.kv_cache.shape[3]
    for first, count, begin, end in prefixes:
        blocks = slice(begin // block_size, end // block_size)
        case.meta.block_table[first : first + count, blocks] = case.meta.block_table[first, blocks].clone()
    return case.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tree", "num_programs", "num_heads", "num_kv_heads", "head_dim", "block_size", "softcap"),
    [
        ("siblings", 40, 4, 2, 128, 64, None),
        ("two levels", 40, 9, 3, 64, 64, None),
        ("two levels", 1, 4, 4, 80, 16, None),
        ("all alike", 40, 7, 1, 96, 32, 5.0),
        ("all alike", 1, 2, 1, 256, 64, None),
    ],
)
def test_shared_prefixes(
    dtype: torch.dtype, tree: str, num_programs: int, num_heads: int, num_kv_heads: int, head_dim: int,
    block_size: int, softcap: float | None,
) -> None:  # fmt: skip
    """Also with padding among the decodes, prompts beside them, and prefixes cut into several parts."""
    prefixes = TREES[tree]
    case = shared_case(
        prefixes, [1, 64, 65, 7, 100, 30, 90], (5,),
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype,
    )  # fmt: skip
    case.meta.seq_lens[6] = 0
    words = torch.from_numpy(cut(prefixes, 7, num_kv_heads, num_heads // num_kv_heads, num_programs)).to(DEVICE)
    meta, shape = replace(case.meta, cascade=cascade_inputs(words, 7)), case.shape(0.2, softcap=softcap)
    q, cache = case.q.float(), LayerCache(case.kv_cache.float())
    sinks = sinks_of(shape) if tree == "two levels" else None
    want = paged_attention_reference(q, cache, meta, shape, sinks)
    plans = twin.StepPlans()
    for _ in range(2):  # the second time, as a later layer
        got = twin.paged_attention_triton(case.q, case.cache, meta, shape, plans, sinks)
        assert relative_error(got, want) < TOLERANCE[dtype]
    assert not got[6].any()


def test_a_window_takes_no_part() -> None:
    """Its layers read each request by itself."""
    prefixes = TREES["all alike"]
    case = shared_case(prefixes, [1, 64, 65, 7, 100, 30], num_heads=4, num_kv_heads=2, head_dim=64, block_size=64)
    words = torch.from_numpy(cut(prefixes, 6, 2, 2, 8)).to(DEVICE)
    meta, shape = replace(case.meta, cascade=cascade_inputs(words, 6)), case.shape(0.2, window=100)
    want = paged_attention_reference(case.q, case.cache, meta, shape)
    got = twin.paged_attention_triton(case.q, case.cache, meta, shape)
    assert relative_error(got, want) < TOLERANCE[torch.float32]


def test_which_steps_decode_from_the_qkv_product() -> None:
    case = shared_case(TREES["siblings"], [1] * 6, block_size=64)
    words = torch.from_numpy(cut(TREES["siblings"], 6, 2, 3, 8))
    assert twin.takes_qkv(case.meta, None)
    assert not twin.takes_qkv(replace(case.meta, cascade=cascade_inputs(words, 6)), None)
