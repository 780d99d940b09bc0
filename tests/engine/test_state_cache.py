"""Layers with a state: where snapshots are taken, what begins from them, and which of them go first."""

import pytest

from nanovllm.engine.engine import Engine
from nanovllm.engine.request import Request
from nanovllm.engine.snapshot_pool import SnapshotPool
from nanovllm.engine.state_cache import StateCache
from tests.engine.fake_device import check_nothing_leaked, check_output, make_engine, make_request, run, steps


def make(**options: object) -> tuple[Engine, StateCache]:
    engine, _ = make_engine(**{"num_snapshots": 20, "num_blocks": 200, "max_num_batched_tokens": 64, **options})
    assert isinstance(engine.scheduler.cache, StateCache)
    return engine, engine.scheduler.cache


def ends(cache: StateCache) -> list[int]:
    """Tokens of the histories that have snapshots."""
    return sorted(snapshot.num_tokens for snapshot in cache.snapshots._by_hash.values())


def complete(engine: Engine, prompt: list[int], max_tokens: int = 1) -> Request:
    request = make_request(prompt, max_tokens)
    engine.add_request(request)
    run(engine)
    check_output(request, has_states=True)
    return request


def test_a_prompt_leaves_snapshots_every_power_of_two_blocks_and_at_its_last_full_block() -> None:
    engine, cache = make(stride=8)
    complete(engine, [i % 97 for i in range(140)])
    assert ends(cache) == [32, 64, 96, 128, 136], "8 at most in its midst, and one for its end"


def test_snapshots_are_where_the_device_can_keep_a_state() -> None:
    engine, cache = make(stride=1, unit=16, max_num_seqs=2)
    requests = [make_request([*range(42), 50 + n, *range(30)], 60) for n in range(2)]
    for request in requests:
        engine.add_request(request)
    run(engine)
    assert ends(cache) and not any(end % 16 for end in ends(cache))
    assert requests[1].num_cached_tokens == 32
    for request in requests:
        check_output(request, has_states=True)


def test_an_end_that_the_last_token_completes_is_no_end() -> None:
    """That token's logits are what a next request with the same prompt needs."""
    engine, cache = make(stride=1000)
    prompt = list(range(40))
    complete(engine, prompt)
    assert ends(cache) == [36]
    assert complete(engine, prompt).num_cached_tokens == 36


def test_a_second_turn_begins_where_the_first_ended() -> None:
    engine, cache = make(stride=8)
    prompt = list(range(30))
    first = complete(engine, prompt, 50)
    assert ends(cache) == [8, 16, 24, 28, 72], "of what was decoded, one snapshot moved along"
    second = complete(engine, [*first.token_ids, 1, 2, 3], 2)
    assert second.num_cached_tokens == 72


def test_where_waiting_prompts_part_there_is_a_snapshot_and_the_second_waits_for_it() -> None:
    engine, cache = make(stride=4, max_num_seqs=4)
    shared = [i % 97 for i in range(50)]
    requests = [make_request([*shared, *range(60, 60 + n)], 3) for n in (30, 20)]
    requests[1].token_ids[50] = 1
    for request in requests:
        engine.add_request(request)
    engine.step()
    assert [request.is_running for request in requests] == [True, False], "half of the second is computed now"
    run(engine)
    assert 48 in ends(cache)
    assert requests[1].num_cached_tokens == 48
    for request in requests:
        check_output(request, has_states=True)


def test_little_is_not_waited_for() -> None:
    engine, _ = make(worth_a_step=60)
    requests = [make_request([*range(40), 50 + n], 3) for n in range(2)]
    for request in requests:
        engine.add_request(request)
    engine.step()
    assert all(request.is_running for request in requests)
    run(engine)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_sequences_of_one_prompt_compute_it_once(enable_prefix_caching: bool) -> None:
    engine, _ = make(enable_prefix_caching=enable_prefix_caching)
    group = [make_request(range(50), 6, name=f"r{i}") for i in range(4)]
    for request in group:
        request.siblings = group
        engine.add_request(request)
    run(engine)
    assert [request.num_cached_tokens for request in group] == [0, 48, 48, 48]
    for request in group:
        check_output(request, has_states=True)
    check_nothing_leaked(engine)


def test_a_history_that_parts_from_one_in_the_cache_leaves_a_snapshot_there() -> None:
    engine, cache = make(stride=1000)
    prompt = list(range(60))
    complete(engine, prompt)
    assert ends(cache) == [56]
    other = [*prompt[:42], *range(10, 30)]
    assert complete(engine, other).num_cached_tokens == 0, "blocks alone are no hit"
    assert ends(cache) == [40, 56, 60]
    assert complete(engine, [*prompt[:42], 7, 8, 9]).num_cached_tokens == 40


def test_a_preempted_request_begins_from_its_own_snapshot() -> None:
    engine, _ = make(num_blocks=17, stride=4, overlap_depth=2)
    requests = [make_request(range(k, k + 20), 20) for k in (0, 30)]
    for request in requests:
        engine.add_request(request)
    computed_again = [
        request.num_computed_tokens
        for _ in steps(engine)
        for request in engine.scheduler.waiting
        if engine.scheduler.stats.num_preemptions
    ]
    assert computed_again, "one of them was preempted"
    assert engine.scheduler.stats.num_tokens_computed < 2 * 40 + 20
    for request in requests:
        check_output(request, has_states=True)


def test_snapshots_whose_blocks_are_gone_go_first_and_an_emptied_cache_has_none() -> None:
    engine, cache = make(num_blocks=16, num_snapshots=2, stride=1000)
    complete(engine, list(range(60)))  # 56 tokens saved
    complete(engine, list(range(40, 64)))  # takes blocks of the first
    complete(engine, list(range(30, 54)))
    assert ends(cache) == [20, 20]
    engine.reset_prefix_cache()
    assert ends(cache) == [] and cache.snapshots.num_free == 2
    assert complete(engine, list(range(30, 54))).num_cached_tokens == 0


def test_aborts_give_reserved_slots_back() -> None:
    engine, _ = make(stride=8)
    request = make_request(range(37), 50)
    engine.add_request(request)
    engine.step()
    engine.step()
    engine.abort(request)
    run(engine)
    check_nothing_leaked(engine)


# -- the pool --


def filled(tokens: list[int], num_slots: int) -> SnapshotPool:
    """One history, with snapshots after so many tokens."""
    pool = SnapshotPool(range(10, 10 + num_slots), lambda _: True)
    before = None
    for num_tokens in tokens:
        slot = pool.reserve(num_tokens)
        assert slot is not None
        pool.publish(slot, bytes([num_tokens]), num_tokens, before)
        before = pool.find(bytes([num_tokens]))
    return pool


def kept(pool: SnapshotPool) -> list[int]:
    return sorted(snapshot.num_tokens for snapshot in pool._by_hash.values())


def test_what_saves_fewest_tokens_goes_and_leaves_its_tokens_to_the_next() -> None:
    pool = filled([40, 100, 110, 200], 4)
    assert pool.reserve(50) is not None
    assert kept(pool) == [40, 100, 200], "110 saved ten"
    assert [snapshot.num_tokens_saved for snapshot in pool._by_hash.values()] == [40, 60, 100]
    assert pool.reserve(20) is None, "it is worth less than all that are there"
    assert pool.reserve(60) is not None
    assert kept(pool) == [100, 200]


def test_what_nobody_uses_goes_in_the_end() -> None:
    pool = filled([250], 2)
    for number in range(20):
        slot = pool.reserve(100)
        if slot is None:
            break
        pool.publish(slot, b"new %d" % number, 100, None)
        used = pool.find(b"new %d" % number)
        assert used is not None
        pool.use(used)
    assert kept(pool) == [100, 100]


def test_what_is_read_in_this_step_stays() -> None:
    pool = filled([40, 100], 2)
    assert pool.reserve(1000, kept=[10, 11]) is None
    assert pool.reserve(1000, kept=[10]) == 11
