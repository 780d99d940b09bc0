"""Which layers share a block table, and how many blocks their requests need."""

from itertools import product

import pytest

from nanovllm.cache_specs import CacheGroups, PagedKV, group_layers

FULL, WINDOW = PagedKV(), PagedKV(1024)


def test_layers_that_keep_the_same_are_one_group() -> None:
    everything = group_layers([None] * 28, 40960)
    assert everything == CacheGroups((FULL,), (tuple(range(28)),))
    assert group_layers([1024] * 28, 40960) == CacheGroups((WINDOW,), (tuple(range(28)),))


def test_a_window_that_no_context_leaves_is_none() -> None:
    assert group_layers([None, 1024] * 2, 1024) == CacheGroups((FULL,), ((0, 1, 2, 3),))
    assert len(group_layers([None, 1024] * 2, 1025).specs) == 2


@pytest.mark.parametrize(
    "name,windows,num_places,num_groups",
    [
        ("Gemma 2 2B", [1024, None] * 13, 13, 2),
        ("Gemma 3 1B", [None if i % 6 == 5 else 1024 for i in range(26)], 4, 7),
        ("Gemma 3 4B", [None if i % 6 == 5 else 1024 for i in range(34)], 5, 7),
        ("Gemma 3 27B", [None if i % 6 == 5 else 1024 for i in range(62)], 10, 7),
        ("OLMo 3 7B", [None if i % 4 == 3 else 1024 for i in range(32)], 8, 4),
    ],
)
def test_groups_of_families(name: str, windows: list[int | None], num_places: int, num_groups: int) -> None:
    groups = group_layers(windows, 32768)
    assert (groups.num_places, len(groups.specs)) == (num_places, num_groups)
    assert groups.specs == (FULL, *[WINDOW] * (num_groups - 1))
    assert sorted(layer for layers in groups.layers for layer in layers) == list(range(len(windows)))
    for spec, layers in zip(groups.specs, groups.layers, strict=True):
        assert {windows[layer] for layer in layers} == {spec.window}
    assert len(groups.layers[0]) == num_places, "what grows with the context has no place unused"


def test_the_blocks_that_are_kept_are_those_that_tokens_still_see() -> None:
    for window, block_size, num_computed in product(range(1, 20), (1, 2, 8), range(50)):
        first = PagedKV(window).first_block(num_computed, block_size)
        first_seen = max(0, num_computed - window + 1)  # by the token that comes next
        assert first * block_size <= first_seen < (first + 1) * block_size


def test_the_most_blocks_of_a_request_are_those_that_some_step_needs() -> None:
    for window, block_size, step, num_tokens in product((1, 3, 8, 9), (1, 4), (1, 3, 8), (1, 7, 30, 40)):
        spec = PagedKV(window)
        needed = 0
        for shift in range(step):  # a step may begin anywhere
            for start in range(shift, num_tokens, step):
                end = min(start + step, num_tokens)
                needed = max(needed, -(-end // block_size) - spec.first_block(start, block_size))
        most = spec.num_blocks(num_tokens, step, block_size)
        assert needed <= most <= min(needed + 1, -(-num_tokens // block_size))


def test_the_longest_request_that_fits() -> None:
    groups = group_layers([None] + [1024] * 5, 32768)
    assert groups.num_blocks(32768, 512, 16) == 2048 + 5 * 97
    most = groups.longest_request(1000, 16, 32768, 512)
    assert groups.num_blocks(most, 512, 16) <= 1000 < groups.num_blocks(most + 1, 512, 16)
    assert groups.longest_request(10**6, 16, 32768, 512) == 32768
    assert groups.longest_request(5, 16, 32768, 512) == 0
    assert group_layers([None] * 4, 32768).longest_request(7, 16, 32768, 512) == 7 * 16


def test_how_many_tokens_fit_is_told_for_requests_as_long_as_they_may_be() -> None:
    assert group_layers([None] * 4, 32768).num_tokens_in(7, 16, 32768, 512) == 7 * 16
    groups = group_layers([None] + [1024] * 5, 32768)
    assert groups.num_tokens_in(2 * (2048 + 5 * 97), 16, 32768, 512) == 2 * 32768
