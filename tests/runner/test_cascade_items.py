"""Cutting shared prefixes into items: every query sees every shared key once, and there is room for all of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.scheduler_output import SharedPrefix
from nanovllm.kernels.cascade import ITEM_FIELDS, ROWS, TILE, max_items, max_parts
from nanovllm.runner.cascade_items import cut


@st.composite
def trees(draw: st.DrawFn) -> tuple[int, list[SharedPrefix]]:
    """Runs of requests beside each other; some share a prefix, and parts of them more behind it."""
    prefixes, first = [], 0
    for _ in range(draw(st.integers(1, 6))):
        count = draw(st.integers(2, 70))
        end = draw(st.integers(1, 40)) * TILE
        if draw(st.booleans()):
            prefixes.append(SharedPrefix(first, count, 0, end))
            inner = first
            while inner + 2 <= first + count and draw(st.booleans()):
                size = draw(st.integers(2, first + count - inner))
                prefixes.append(SharedPrefix(inner, size, end, end + draw(st.integers(1, 500)) * TILE))
                inner += size
        first += count
    return first, prefixes


@given(trees(), st.sampled_from([1, 2, 8]), st.sampled_from([1, 2, 7, 64, 100]), st.sampled_from([1, 132, 264]))
def test_every_shared_key_is_seen_once(
    tree: tuple[int, list[SharedPrefix]], num_kv_heads: int, group: int, num_programs: int
) -> None:
    num_reqs, prefixes = tree
    words = cut(prefixes, num_reqs, num_kv_heads, group, num_programs)
    num_items, shared_lens, num_parts = words[0], words[-2 * num_reqs : -num_reqs], words[-num_reqs:]
    assert num_items <= max_items(num_reqs) and num_parts.max() <= max_parts(num_reqs)
    items = words[1 : 1 + num_items * ITEM_FIELDS].reshape(-1, ITEM_FIELDS)
    seen = np.zeros((num_reqs, shared_lens.max(initial=0) // TILE), dtype=int)
    parts: list[set[int]] = [set() for _ in range(num_reqs)]
    for first, count, begin, end, part in items.tolist():
        assert 0 < count <= max(1, ROWS // group) and begin < end and begin % TILE == end % TILE == 0
        seen[first : first + count, begin // TILE : end // TILE] += 1
        for req in range(first, first + count):
            assert part not in parts[req], "a result would be overwritten"
            parts[req].add(part)
    for req in range(num_reqs):
        depth = max((p.end for p in prefixes if p.first <= req < p.first + p.num_reqs), default=0)
        assert shared_lens[req] == depth
        assert (seen[req, : depth // TILE] == 1).all() and not seen[req, depth // TILE :].any()
        assert parts[req] == set(range(num_parts[req]))


@pytest.mark.parametrize(
    ("prefixes", "num_reqs", "num_parts"),
    [
        ([SharedPrefix(0, 512, 0, 2048)], 512, 2),  # 16 times 32 requests, 8 heads: two parts each fill 264 programs
        ([SharedPrefix(16 * i, 16, 0, 1024) for i in range(32)], 512, 1),
        ([SharedPrefix(0, 16, 0, 32768)], 16, 32),
    ],
)
def test_parts_keep_all_programs_busy(prefixes: list[SharedPrefix], num_reqs: int, num_parts: int) -> None:
    assert cut(prefixes, num_reqs, 8, 2, 264)[-num_reqs:].max() == num_parts


def test_nothing_shared() -> None:
    assert not cut([], 20, 8, 2, 264).any()
