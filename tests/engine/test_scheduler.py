"""The scheduler's promises one by one, on a device without a model."""

from collections import Counter
from typing import Any

import pytest

from nanovllm.engine import cache_manager as cache_module
from nanovllm.engine.request import End
from nanovllm.engine.scheduler_output import SchedulerOutput
from tests.engine.fake_device import (
    check_nothing_leaked,
    check_output,
    expected_output,
    make_engine,
    make_request,
    run,
    steps,
)


@pytest.mark.parametrize("overlap_depth", [1, 2, 3])
def test_preempted_newest_comes_back_with_the_same_tokens(overlap_depth: int) -> None:
    """Two requests that together outgrow the cache; the older one is never disturbed."""
    engine, _ = make_engine(num_blocks=8, block_size=4, overlap_depth=overlap_depth, enable_prefix_caching=False)
    old, new = make_request(range(8), 20, name="old"), make_request(range(8, 16), 20, name="new")
    engine.add_request(old)
    engine.add_request(new)
    preempted = set()
    for _ in steps(engine):
        preempted |= {r.request_id for r in (old, new) if r.end is None and r.row < 0}
    assert preempted == {"new"}
    for request in (old, new):
        check_output(request)
    check_nothing_leaked(engine)


def test_preempted_request_finds_its_own_blocks_again() -> None:
    """What nobody needed in the meantime is not computed twice."""
    engine, device = make_engine(num_blocks=20, block_size=4)
    first, second = make_request(range(40), 24), make_request(range(40, 52), 24)
    engine.add_request(first)
    engine.add_request(second)
    for _ in steps(engine):
        if engine.scheduler.stats.num_preemptions:
            break
    assert second.end is None and not second.is_running
    num_tokens = second.num_tokens
    first_blocks_end = len(device.plans)
    run(engine)
    resumed = next(plan for plan in device.plans[first_blocks_end:] if plan.new_rows)
    assert resumed.new_rows[0].num_computed_tokens > 0
    assert num_tokens < second.num_tokens
    check_output(first)
    check_output(second)


def test_running_requests_get_a_token_in_every_step_while_others_arrive() -> None:
    engine, _ = make_engine(num_blocks=400, max_num_seqs=8, max_num_batched_tokens=16)
    early = [make_request(range(i, i + 5), 40, name=f"early{i}") for i in range(3)]
    for request in early:
        engine.add_request(request)
    engine.step()
    engine.step()
    for step in range(30):
        before = [len(request.token_ids) for request in early]
        engine.add_request(make_request(range(step, step + 30), 1, name=f"late{step}"))
        engine.step()
        assert [len(request.token_ids) for request in early] == [length + 1 for length in before]


def test_a_long_prompt_before_them_does_not_stop_younger_requests() -> None:
    """One token is kept for each running request before anyone's chunk is sized."""
    engine, device = make_engine(num_blocks=400, max_num_seqs=4, max_num_batched_tokens=8)
    young = make_request([1, 2, 3], 50)
    engine.add_request(young)
    engine.step()
    engine.add_request(make_request(range(90), 1))
    for _ in range(5):
        length = len(young.token_ids)
        engine.step()
        assert len(young.token_ids) == length + 1
        assert device.num_tokens_per_step[-1] == 8


def test_identical_prompts_submitted_together_compute_their_prompt_once() -> None:
    """The others share blocks that the same step fills, and their tokens are right."""
    engine, device = make_engine(num_blocks=200, block_size=4, max_num_seqs=8, max_num_batched_tokens=80)
    requests = [make_request(range(40), 4, name=str(i)) for i in range(8)]
    for request in requests:
        engine.add_request(request)
    engine.step()
    assert sum(device.num_tokens_per_step) == 40 + 7 * 4  # the last block is computed by each, for its logits
    run(engine)
    for request in requests:
        check_output(request)


def test_the_budget_is_filled_while_work_remains() -> None:
    engine, device = make_engine(num_blocks=400, max_num_seqs=8, max_num_batched_tokens=16)
    for i in range(6):
        engine.add_request(make_request([i] * 23, 4, name=str(i)))
    run(engine)
    total = 6 * 23
    assert device.num_tokens_per_step[: total // 16] == [16] * (total // 16)


def test_allocation_work_follows_the_request_and_each_token_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in block hashes and in blocks taken from a large pool."""
    hashed: Counter[tuple[bytes, tuple[int, ...]]] = Counter()
    real = cache_module.hash_block

    def counting(parent: bytes, token_ids: list[int]) -> bytes:
        hashed[parent, tuple(token_ids)] += 1
        return real(parent, token_ids)

    monkeypatch.setattr(cache_module, "hash_block", counting)
    engine, _ = make_engine(num_blocks=12, block_size=4, max_num_batched_tokens=9)
    requests = [make_request(range(i, i + 14), 20, name=str(i)) for i in range(2)]
    for request in requests:
        engine.add_request(request)
    run(engine)
    assert engine.scheduler.stats.num_preemptions > 0
    assert max(hashed.values()) == 1
    for request in requests:
        check_output(request)


def test_a_shared_prefix_of_64_tokens_hits() -> None:
    """For every block size offered."""
    for block_size in (8, 16, 32, 64):
        engine, _ = make_engine(num_blocks=40, block_size=block_size, max_num_batched_tokens=256)
        first = make_request([*range(64), 70], 1)
        second = make_request([*range(64), 71], 1)
        engine.add_request(first)
        run(engine)
        engine.add_request(second)
        run(engine)
        assert second.num_cached_tokens == 64
        check_output(second)


def test_salts_keep_prefixes_apart() -> None:
    engine, _ = make_engine(block_size=4)
    first, second, third = (make_request(range(16), 1, name=str(i)) for i in range(3))
    first.cache_salt = third.cache_salt = b"a"
    for request in (first, second, third):
        engine.add_request(request)
        run(engine)
    assert (first.num_cached_tokens, second.num_cached_tokens, third.num_cached_tokens) == (0, 0, 12)


def test_waiting_requests_hold_no_blocks_and_come_in_order() -> None:
    """First come first served."""
    engine, _ = make_engine(num_blocks=64, max_num_seqs=2)
    requests = [make_request([i, i + 1], 5, name=str(i)) for i in range(6)]
    order = []
    for request in requests:
        engine.add_request(request)
    for changed in steps(engine):
        order += [request.request_id for request in changed if request.is_finished]
        assert sum(bool(request.block_ids) for request in requests) <= 2
    assert order == sorted(order)


@pytest.mark.parametrize("overlap_depth", [1, 2, 3])
def test_stop_tokens_seen_late_leave_no_token_behind(overlap_depth: int) -> None:
    expected = expected_output([5, 6, 7], 60, frozenset())
    stop = expected[9]
    engine, _ = make_engine(overlap_depth=overlap_depth)
    request = make_request([5, 6, 7], 50, [stop])
    engine.add_request(request)
    run(engine)
    assert request.output_token_ids == expected[: expected.index(stop) + 1]
    assert request.end == End("stop", stop)
    check_nothing_leaked(engine)


@pytest.mark.parametrize("overlap_depth", [1, 2, 3])
def test_length_stops_waste_no_step(overlap_depth: int) -> None:
    engine, device = make_engine(overlap_depth=overlap_depth)
    engine.add_request(make_request([1, 2, 3], 10))
    run(engine)
    assert device.num_tokens_per_step == [3] + [1] * 9


def test_abort_in_every_state_frees_everything() -> None:
    for num_steps in range(12):
        engine, _ = make_engine(num_blocks=8, block_size=4, overlap_depth=2)
        requests = [make_request(range(10), 20, name="a"), make_request(range(10, 22), 20, name="b")]
        for request in requests:
            engine.add_request(request)
        for _ in range(num_steps):
            engine.step()
        for request in requests:
            engine.abort(request)
            engine.abort(request)
        assert {request.end for request in requests} == {End("abort")}
        run(engine)
        check_nothing_leaked(engine)


@pytest.mark.parametrize("overlap_depth", [1, 2, 3])
def test_a_request_that_needs_its_tokens_on_the_host_waits_and_nobody_else_does(overlap_depth: int) -> None:
    """It is planned only when the host has read all its tokens; its neighbour gets a token in every step."""
    engine, device = make_engine(overlap_depth=overlap_depth)
    careful = make_request(range(5), 10, name="careful", needs_host_tokens=True)
    other = make_request(range(5, 9), 30, name="other")
    engine.add_request(careful)
    engine.add_request(other)
    for _ in steps(engine):
        assert careful.num_pending_tokens <= 1
    assert all(-1 not in plan.token_ids for plan in device.plans) == (overlap_depth == 1)
    assert len(device.plans) == 30, "the other one ran in every step"
    assert sum(len(plan.rows) for plan in device.plans) == 40
    if overlap_depth > 1:
        assert sum(len(plan.rows) == 2 for plan in device.plans) == 10
        assert [len(plan.rows) for plan in device.plans[: 2 * overlap_depth]] == ([2] + [1] * (overlap_depth - 1)) * 2
    check_output(careful)
    check_output(other)
    check_nothing_leaked(engine)


@pytest.mark.parametrize("overlap_depth", [1, 2])
def test_a_request_that_needs_its_tokens_on_the_host_runs_alone(overlap_depth: int) -> None:
    engine, _ = make_engine(overlap_depth=overlap_depth)
    request = make_request(range(5), 10, needs_host_tokens=True)
    engine.add_request(request)
    run(engine)
    check_output(request)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("budget", [16, 80, 500])
def test_siblings_compute_their_prompt_once(enable_prefix_caching: bool, budget: int) -> None:
    """With and without the prefix cache, in chunks or at once; only what no full block holds is repeated."""
    engine, device = make_engine(
        num_blocks=400,
        block_size=4,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        enable_prefix_caching=enable_prefix_caching,
    )
    group = [make_request(range(43), 4, name="g") for _ in range(8)]
    for index, request in enumerate(group):
        request.index, request.siblings = index, group
        engine.add_request(request)
    run(engine)
    for request in group:
        check_output(request)
    # All 43 once, 3 (behind the tenth block) for each other one, and 3 output tokens for each.
    assert sum(device.num_tokens_per_step) == 43 + 7 * 3 + 8 * 3
    check_nothing_leaked(engine)


def test_siblings_hash_their_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    hash_block = cache_module.hash_block
    monkeypatch.setattr(
        cache_module, "hash_block", lambda parent, ids: hashed.append(ids[0]) or hash_block(parent, ids)
    )
    engine, _ = make_engine(num_blocks=400, block_size=4)
    group = [make_request(range(40), 1, name="g") for _ in range(8)]
    for request in group:
        request.siblings = group
        engine.add_request(request)
    run(engine)
    assert sorted(hashed) == list(range(0, 40, 4))


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_sibling_goes_on_when_the_one_that_computed_the_prompt_is_aborted(enable_prefix_caching: bool) -> None:
    engine, device = make_engine(num_blocks=400, block_size=4, enable_prefix_caching=enable_prefix_caching)
    group = [make_request(range(43), 9, name="g") for _ in range(3)]
    for request in group:
        request.siblings = group
        engine.add_request(request)
    for num_steps in (1, 2):
        for _ in range(num_steps):
            engine.step()
        engine.abort(group[num_steps - 1])
        device.poison(engine.scheduler.cache.pool)
    run(engine)
    check_output(group[2])
    check_nothing_leaked(engine)


def test_without_chunked_prefill_a_prompt_is_computed_whole() -> None:
    """A prompt waits until the budget holds all of it, and those behind it wait with it; nobody starves."""
    scheduler_options = {"num_blocks": 100, "max_num_batched_tokens": 20, "enable_chunked_prefill": False}
    engine, device = make_engine(**scheduler_options)
    requests = [make_request(range(i, i + length), 6, name=f"r{i}") for i, length in enumerate((8, 8, 20, 3))]
    for request in requests:
        engine.add_request(request)
    run(engine)
    for plan in device.plans:
        for new in plan.new_rows:
            count = plan.num_scheduled_tokens[plan.rows.index(new.row)]
            assert new.num_computed_tokens + count == new.num_prompt_tokens, "the rest of the prompt in one step"
    assert [len(plan.new_rows) for plan in device.plans if plan.new_rows] == [2, 1, 1]
    for request in requests:
        check_output(request)
    check_nothing_leaked(engine)


@pytest.mark.parametrize("overlap_depth", [1, 2, 3])
def test_a_request_that_failed_ends_and_the_others_go_on(overlap_depth: int) -> None:
    engine, device = make_engine(overlap_depth=overlap_depth)
    failing, other = make_request(range(5), 20, name="failing"), make_request(range(5, 9), 20, name="other")
    engine.add_request(failing)
    engine.add_request(other)
    execute = device.execute

    def fail_once(plan: SchedulerOutput) -> Any:
        done = execute(plan)
        if len(device.plans) == 6:
            done.failures = {plan.rows.index(0): "the processor raised KeyError: 'x'"}
        return done

    device.execute = fail_once  # type: ignore[method-assign]
    ended = []
    for changed in steps(engine):
        ended += [request for request in changed if request.is_finished]
    assert ended == [failing, other]
    assert failing.end == End("error", error="the processor raised KeyError: 'x'")
    expected = expected_output(range(5), 25, frozenset())
    assert failing.output_token_ids == expected[:5], "what the failed step would have sampled is not a token of it"
    assert other.end == End("length")
    check_output(other)
    check_nothing_leaked(engine)
