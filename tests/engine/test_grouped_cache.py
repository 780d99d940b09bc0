"""Layers with a window: what has left it is given back, and a prefix is found where what it needs is there."""

import pytest

from nanovllm.cache_specs import PagedKV, group_layers
from nanovllm.engine.grouped_cache import NO_BLOCK, GroupedCache
from nanovllm.engine.request import Request
from tests.engine.fake_device import check_nothing_leaked, check_output, make_engine, make_request, run, steps

SPECS = (PagedKV(), PagedKV(8))  # with blocks of 4


def held(request: Request) -> list[int]:
    """Blocks in each of the request's tables."""
    return [sum(block_id != NO_BLOCK for block_id in table) for table in request.block_ids]


@pytest.mark.parametrize("overlap_depth", [1, 2, 3])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_long_context_costs_what_its_window_costs(overlap_depth: int, enable_prefix_caching: bool) -> None:
    engine, device = make_engine(
        num_blocks=60, specs=SPECS, overlap_depth=overlap_depth, enable_prefix_caching=enable_prefix_caching
    )
    request = make_request([i % 97 for i in range(150)], 40)
    engine.add_request(request)
    most = 0
    for _ in steps(engine):
        device.poison(engine.scheduler.cache.pool)
        if request.block_ids and request.num_computed_tokens > 156:  # the chunks are behind
            full, window = held(request)
            assert full == -(-request.num_computed_tokens // 4)
            most = max(most, window)
    assert most == 3, "8 positions lie in 3 blocks at most"
    check_output(request, SPECS)
    check_nothing_leaked(engine)


def test_a_chunk_holds_its_window_and_itself() -> None:
    engine, _ = make_engine(num_blocks=100, specs=SPECS, max_num_batched_tokens=16)
    request = make_request([i % 97 for i in range(100)], 1)
    engine.add_request(request)
    for _ in steps(engine):
        if request.block_ids:
            full, window = held(request)
            assert full == 25, "what sees everything has its blocks from the beginning"
            assert window <= (8 + 16 - 1) // 4 + 1
    check_output(request, SPECS)


def test_a_prefix_needs_all_of_one_group_and_a_window_of_the_other() -> None:
    engine, _ = make_engine(num_blocks=100, specs=SPECS, max_num_batched_tokens=64)
    prompt = list(range(42))
    engine.add_request(make_request(prompt, 1))
    run(engine)
    cache = engine.scheduler.cache
    probe = make_request([*prompt, 90, 91], 1)
    full, window = cache.find_prefix(probe)
    assert len(full) == len(window) == 10 and NO_BLOCK not in full
    assert window[:8] == [NO_BLOCK] * 8 and NO_BLOCK not in window[8:], "the token at 40 sees 33 to 40"
    forget(cache, window[9])
    assert [len(table) for table in cache.find_prefix(probe)] == [9, 9], "the one at 36 sees 29 to 36"
    lost = cache.find_prefix(probe)[1][7]
    forget(cache, lost)
    assert [len(table) for table in cache.find_prefix(probe)] == [7, 7]
    forget(cache, full[2])
    assert [len(table) for table in cache.find_prefix(probe)] == [2, 2]
    engine.add_request(probe)
    run(engine)
    assert probe.num_cached_tokens == 8
    check_output(probe, SPECS)


def test_behind_a_cached_prefix_only_the_rest_is_taken() -> None:
    engine, _ = make_engine(num_blocks=100, specs=SPECS, max_num_batched_tokens=64)
    engine.add_request(make_request(range(42), 1))
    run(engine)
    probe = make_request([*range(42), 90, 91], 1)
    engine.add_request(probe)
    engine.scheduler.schedule()
    assert len(probe.block_ids[0]) == 44 // 4


@pytest.mark.parametrize("specs", [(PagedKV(),), SPECS])
def test_a_block_for_each_table_of_each_request_is_enough(specs: tuple[PagedKV, ...]) -> None:
    engine, _ = make_engine(num_blocks=3 * len(specs), specs=specs)
    requests = [make_request(range(4), 4) for _ in range(4)]
    assert engine.scheduler.cache.has_blocks(requests[:3])
    assert not engine.scheduler.cache.has_blocks(requests)


def forget(cache, block_id: int) -> None:  # type: ignore[no-untyped-def]
    del cache.pool._block_of_hash[cache.pool._hashes[block_id]]
    cache.pool._hashes[block_id] = None


def test_what_left_the_window_of_one_who_runs_is_found_while_nobody_needs_its_blocks() -> None:
    """The short turn: a prompt that ends where the blocks behind the window have been given back."""
    engine, _ = make_engine(num_blocks=100, specs=SPECS, max_num_batched_tokens=64)
    running = make_request(list(range(60)), 30)
    engine.add_request(running)
    for _ in range(5):
        engine.step()
    other = make_request([*range(22), 95], 2)
    engine.add_request(other)
    run(engine)
    assert other.num_cached_tokens == 20
    for request in (running, other):
        check_output(request, SPECS)
    check_nothing_leaked(engine)


def test_siblings_without_a_prefix_cache_take_only_what_is_held() -> None:
    engine, _ = make_engine(num_blocks=200, specs=SPECS, max_num_batched_tokens=64, enable_prefix_caching=False)
    group = [make_request(list(range(42)), 20, name=str(i)) for i in range(2)]
    for index, request in enumerate(group):
        request.index, request.siblings = index, group
    engine.add_request(group[0])
    engine.step()
    assert [len(table) for table in engine.scheduler.cache.find_prefix(group[1])] == [10, 10]
    for _ in range(12):
        engine.step()
    assert [len(table) for table in engine.scheduler.cache.find_prefix(group[1])] == [0, 0], "its window moved on"
    engine.add_request(group[1])
    run(engine)
    for request in group:
        check_output(request, SPECS)


def test_a_pool_that_holds_one_long_request_runs_several_one_after_the_other() -> None:
    engine, device = make_engine(num_blocks=50 + 12, specs=SPECS, max_num_batched_tokens=32)
    requests = [make_request([i] * 150, 50, name=str(i)) for i in range(3)]
    for request in requests:
        engine.add_request(request)
    for _ in steps(engine):
        device.poison(engine.scheduler.cache.pool)
    for request in requests:
        check_output(request, SPECS)
    check_nothing_leaked(engine)


def test_blocks_of_other_groups_of_an_entering_row_are_in_the_plan() -> None:
    engine, device = make_engine(specs=SPECS, max_model_len=64)  # tables of 16 blocks
    engine.add_request(make_request(range(6), 3))
    engine.step()
    (plan,) = device.plans
    assert plan.new_rows[0].block_ids == [0, 1]
    assert plan.new_blocks == [(0, 16, 2), (0, 17, 3)]


# Windows and KV numbers of a token by layer, and whose keys and values a layer reads: every 6th or 5th layer sees all.
GEMMA = {
    "Gemma 3 4B": ([None if layer % 6 == 5 else 1024 for layer in range(34)], [], []),
    "Gemma 4 E2B": (
        [None if layer % 5 == 4 else 512 for layer in range(35)],
        [512 if layer % 5 == 4 else 256 for layer in range(35)],
        [layer if layer < 15 else 14 if layer % 5 == 4 else 13 for layer in range(35)],
    ),
    "Gemma 4 31B": (
        [None if layer % 6 == 5 else 1024 for layer in range(60)],
        [4 * 512 if layer % 6 == 5 else 16 * 256 for layer in range(60)],
        [],
    ),
}


@pytest.mark.parametrize("shape", GEMMA)
def test_at_32k_tokens_layers_with_a_window_keep_it_and_no_more(shape: str) -> None:
    """By the manager's own tables, behind a prompt in chunks and while tokens are decoded, unused places counted in."""
    windows, row_sizes, sources = GEMMA[shape]
    length, block_size = 32768, 64
    groups = group_layers(windows, length, row_sizes, sources)
    cache = GroupedCache(8000, block_size, False, groups.specs, length, 2048)
    request = make_request([i % 97 for i in range(length - 768)], 768)
    cache.enter(request, [[] for _ in groups.specs])
    for num_tokens in (*[2048] * 15, 1280, *[1] * 768):
        assert cache.allocate(request, num_tokens) is not None
        request.num_computed_tokens += num_tokens
    cache.allocate(request, 0)
    sizes = row_sizes or [1] * len(windows)
    kept = [layer for layer in range(len(windows)) if groups.source(layer) == layer]
    unit = sum(sizes[layer] for layer in kept) / groups.num_places_used
    in_windows = sum(
        count * block_size * groups.num_places * unit
        for count, spec in zip(held(request), groups.specs, strict=True)
        if spec.window is not None
    )
    windows_alone = sum(windows[layer] * sizes[layer] for layer in kept if windows[layer])
    assert in_windows <= 1.125 * windows_alone, "a window of 512 lies in 9 blocks of 64"
    everything = sum(length * sizes[layer] for layer in kept)
    assert in_windows < everything / 8
