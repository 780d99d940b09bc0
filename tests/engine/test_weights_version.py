"""Blocks are found by requests that compute with the same weights, and by no others."""

import pytest

from nanovllm.engine.features.weights_version import WeightsVersion
from tests.engine.fake_device import make_engine, make_request, run
from tests.engine.test_planner_rules import make_group


def test_no_two_versions_have_one_root() -> None:
    first = WeightsVersion()
    assert (first.number, first.root) == (0, b"")
    roots = {first.next().root for _ in range(9)} | {first.next().next().root}
    assert len(roots) == 10 and {len(root) for root in roots} == {16}
    assert first.next().next().number == 2


@pytest.mark.parametrize("salt", [b"", b"salt"])
def test_a_prompt_is_found_by_the_name_of_the_weights_that_computed_it(salt: bytes) -> None:
    engine, _ = make_engine(num_blocks=40, block_size=4)
    cache = engine.scheduler.cache
    loaded, updated = cache.weights, cache.weights.next()
    for version, num_cached in ((loaded, 0), (loaded, 12), (updated, 0), (updated, 12), (loaded, 12)):
        cache.weights = version
        request = make_request(range(14), 2)
        request.cache_salt = salt
        engine.add_request(request)
        run(engine)
        assert request.num_cached_tokens == num_cached, version.number


@pytest.mark.parametrize("num_tokens_before", [1, 9])  # before its first block is full, and after
def test_what_goes_on_under_new_weights_is_found_by_nobody(num_tokens_before: int) -> None:
    engine, _ = make_engine(num_blocks=80, block_size=4)
    mixed = make_request(range(2), 40)
    engine.add_request(mixed)
    while len(mixed.output_token_ids) < num_tokens_before:
        engine.step()
    engine.scheduler.cache.weights = engine.scheduler.cache.weights.next()
    run(engine)
    cached = []
    for _ in range(2):
        later = make_request(mixed.token_ids, 1)
        engine.add_request(later)
        run(engine)
        cached.append(later.num_cached_tokens)
    assert cached == [0, 40], "what only the new weights have computed is found"


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_sibling_that_enters_under_new_weights_shares_nothing(enable_prefix_caching: bool) -> None:
    engine, _ = make_engine(num_blocks=40, block_size=4, enable_prefix_caching=enable_prefix_caching)
    first, second, third = make_group(range(10), 3)
    engine.add_request(first)
    engine.step()
    cache = engine.scheduler.cache
    assert cache.find_prefix(second) == [first.block_ids[0][:2]]
    cache.weights = cache.weights.next()
    assert cache.find_prefix(second) == cache.find_prefix(third) == [[]]
    assert cache._hashes(second, 2) == cache._hashes(third, 2)
    assert set(cache._hashes(second, 2)).isdisjoint(cache._hashes(first, 2))
