"""What each step plans, rule by rule: who enters, in which order, what is shared and when, and what a restart forgets.

These look at plans, queues and blocks. Most of the rules leave every token right when they are broken, so the tokens
of `test_scheduler_oracle.py` would not tell.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from nanovllm.engine.engine import Engine
from nanovllm.engine.features.capture import Capture
from nanovllm.engine.features.context_length import LONG_SALT, Context
from nanovllm.engine.features.scoring import Scoring
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.request import End, Request
from nanovllm.engine.scheduler_output import NewRow, SchedulerOutput
from nanovllm.sampling_params import SamplingParams
from tests.engine.fake_device import (
    check_nothing_leaked,
    check_output,
    expected_output,
    make_engine,
    make_request,
    run,
    steps,
)


def is_cached(engine: Engine, request: Request, num_blocks: int) -> bool:
    """Would anyone who comes now find exactly so many blocks of what this request has written?"""
    probe = make_request([*request.token_ids, 96, 96, 96, 96, 96, 96, 96, 96, 96], name="probe")
    probe.cache_salt = request.cache_salt
    return len(engine.scheduler.cache.find_prefix(probe)[0]) == num_blocks


def is_waiting(request: Request) -> bool:
    return request.row < 0 and request.end is None


def make_group(prompt: Sequence[int], count: int, max_tokens: int = 8) -> list[Request]:
    group = [make_request(prompt, max_tokens, name=f"sibling{i}") for i in range(count)]
    for index, request in enumerate(group):
        request.index, request.siblings = index, group
    return group


# -- who enters, and when --


def test_a_request_enters_with_all_that_a_worker_must_know() -> None:
    engine, device = make_engine(block_size=4)
    request = make_request(range(6), 3, [50])
    request.seed, request.context, request.bad_words = 7, Context(6), ((1, 2),)
    engine.add_request(request)
    engine.step()
    assert device.plans == [
        SchedulerOutput(
            new_rows=[
                NewRow(
                    row=0,
                    num_computed_tokens=0,
                    num_prompt_tokens=6,
                    block_ids=[0, 1],
                    params=request.params,
                    seed=7,
                    stop_token_ids=(50,),
                    token_ids=None,
                    bad_words=((1, 2),),
                    rope_len=6,
                )
            ],
            new_blocks=[],
            rows=[0],
            num_scheduled_tokens=[6],
            num_computed_tokens=[0],
            num_samples=[1],
            token_ids=list(range(6)),
            num_decodes=0,
        )
    ]
    historian = make_request([9], 3)
    historian.needs_history = True
    engine.add_request(historian)
    engine.step()
    (entered,) = device.plans[-1].new_rows
    assert (entered.row, entered.token_ids, entered.block_ids) == (1, [9], [2])
    assert device.plans[-1].rows == [0, 1], "who runs stands before who enters"


def test_a_step_that_preempts_admits_nobody() -> None:
    """Its blocks belong to those that run: here the preempted one, which finds all but its last block with its twin,
    could come back at once, and would take the block that the twin needs next."""
    engine, device = make_engine(num_blocks=6, block_size=4)
    twins = [make_request(range(8), 12, name="old"), make_request(range(8), 12, name="new")]
    for request in twins:
        engine.add_request(request)
    preempting = []
    for _ in steps(engine):
        if engine.scheduler.stats.num_preemptions > len(preempting):
            preempting.append(device.plans[-1])
    assert preempting
    assert not any(plan.new_rows for plan in preempting)
    for request in twins:
        check_output(request)


def test_a_preempted_request_stands_before_those_that_came_later() -> None:
    engine, device = make_engine(num_blocks=8, block_size=4, max_num_seqs=3, enable_prefix_caching=False)
    old, new = make_request(range(8), 20, name="old"), make_request(range(8, 16), 12, name="new")
    late = make_request([90, 91], 2, name="late")
    engine.add_request(old)
    engine.add_request(new)
    for _ in steps(engine):
        if engine.scheduler.stats.num_preemptions == 1:
            break
    engine.add_request(late)
    assert list(engine.scheduler.waiting) == [new, late]
    entered = []
    for _ in steps(engine):
        entered += [r.request_id for r in (new, late) if r.row in [row.row for row in device.plans[-1].new_rows]]
    assert entered == ["new", "late"]


def test_what_runs_longest_is_preempted_last() -> None:
    engine, _ = make_engine(num_blocks=12, block_size=4, enable_prefix_caching=False)
    requests = [make_request(range(i, i + 8), 25, name=str(i)) for i in range(4)]
    for request in requests:
        engine.add_request(request)
    before: list[Request] = []
    for _ in steps(engine):
        left = [request for request in before if is_waiting(request)]
        assert left == before[len(before) - len(left) :]
        before = list(engine.scheduler.running)
    assert engine.scheduler.stats.num_preemptions > 2


def test_the_budget_is_given_to_the_oldest_first_and_spent_to_the_last_token() -> None:
    engine, device = make_engine(num_blocks=100, max_num_seqs=4, max_num_batched_tokens=10)
    young, long, last = make_request(range(3), 50), make_request(range(25), 4), make_request(range(40, 44), 4)
    for request in (young, long, last):
        engine.add_request(request)
    for _ in range(4):
        engine.step()
    by_request = [dict(zip(plan.rows, plan.num_scheduled_tokens, strict=True)) for plan in device.plans]
    assert by_request == [{0: 3, 1: 7}, {0: 1, 1: 9}, {0: 1, 1: 9}, {0: 1, 1: 1, 2: 4}]
    assert [plan.num_samples for plan in device.plans] == [[1, 0], [1, 0], [1, 1], [1, 1, 1]]


def test_requests_of_one_token_stand_first_in_a_plan() -> None:
    engine, device = make_engine(num_blocks=100)
    first, long, single = make_request(range(3), 9), make_request(range(10, 20), 9), make_request([30], 9)
    engine.add_request(first)
    engine.step()
    engine.add_request(long)
    engine.add_request(single)
    engine.step()
    assert device.plans[-1].rows == [0, 2, 1]
    assert device.plans[-1].num_scheduled_tokens == [1, 1, 10]
    assert device.plans[-1].num_decodes == 2


def test_what_is_counted() -> None:
    engine, _ = make_engine(num_blocks=100, block_size=4, max_num_batched_tokens=8)
    first, second = make_request(range(10), 3), make_request(range(10), 1)
    engine.add_request(first)
    run(engine)
    stats = engine.scheduler.stats
    assert (stats.num_tokens_computed, stats.num_tokens_sampled, stats.num_prompt_tokens_cached) == (12, 3, 0)
    assert stats.num_context_tokens_read == 8 + 10 + 11 + 12
    assert stats.num_query_key_pairs == sum(range(1, 13))
    engine.add_request(second)
    run(engine)
    assert (stats.num_tokens_computed, stats.num_tokens_sampled, stats.num_prompt_tokens_cached) == (14, 4, 8)
    assert stats.num_preemptions == 0


# -- what is shared, and when --


@pytest.mark.parametrize("overlap_depth", [1, 2, 3])
@pytest.mark.parametrize("needs_general_rule", [False, True])
def test_a_decoded_block_is_found_as_soon_as_its_tokens_are_known(overlap_depth: int, needs_general_rule: bool) -> None:
    """Not before: steps may be planned ahead of tokens that nobody has read yet. Not later, either."""
    engine, _ = make_engine(block_size=4, overlap_depth=overlap_depth)
    request = make_request(range(6), 20)
    request.context = Context(0, 10**6) if needs_general_rule else None
    engine.add_request(request)
    for changed in steps(engine):
        if changed and not request.is_finished:
            assert request.num_published_blocks == (len(request.token_ids) - 1) // 4
            assert is_cached(engine, request, (len(request.token_ids) - 1) // 4)


def test_what_ends_can_be_found_to_its_last_full_block() -> None:
    """The token that ends a request would be the one behind its last block: no later step publishes that block."""
    ninth = expected_output(range(4), 9, frozenset())[-1]
    for end, max_tokens, stop in (("length", 5, []), ("stop", 40, [ninth]), ("abort", 40, [])):
        engine, _ = make_engine(block_size=4)
        request = make_request(range(4), max_tokens, stop)
        engine.add_request(request)
        for _ in steps(engine):
            if end == "abort" and len(request.token_ids) == 9:
                engine.abort(request)
        assert request.end is not None and (request.end.finish_reason, len(request.token_ids)) == (end, 9)
        assert is_cached(engine, request, 2)


def test_each_block_is_published_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it came from the cache, and after a preemption."""
    engine, _ = make_engine(num_blocks=40, block_size=4)
    published: Counter[bytes] = Counter()
    publish = engine.scheduler.cache.pool.publish

    def counting(block_id: int, block_hash: bytes) -> None:
        published[block_hash] += 1
        publish(block_id, block_hash)

    monkeypatch.setattr(engine.scheduler.cache.pool, "publish", counting)
    for tail in range(3):
        request = make_request([*range(16), 50 + tail, 60, 61, 62, 63], 6)
        engine.add_request(request)
        run(engine)
    assert request.num_cached_tokens == 16
    assert set(published.values()) == {1}


def test_a_preempted_request_has_published_nothing() -> None:
    engine, _ = make_engine(num_blocks=8, block_size=4)
    old, new = make_request(range(8), 20), make_request(range(8, 16), 20)
    engine.add_request(old)
    engine.add_request(new)
    for _ in steps(engine):
        if is_waiting(new):
            break
    assert (new.num_published_blocks, new.num_computed_tokens, new.block_ids, new.row) == (0, 0, [], -1)
    assert new.num_cached_tokens == 0, "what it found when it was first admitted stays what is told"


def test_a_block_is_hashed_when_the_host_knows_all_its_tokens() -> None:
    """Of a request that is preempted while the last token of a block is on its way: that block can be found later."""
    engine, _ = make_engine(block_size=4, overlap_depth=3)
    request = make_request(range(6), 20)
    request.context = Context(0, 10**6)  # so that no step is planned the short way
    engine.add_request(request)
    for _ in steps(engine):
        if len(request.token_ids) == 7 and request.row >= 0:
            assert request.num_computed_tokens == 8, "the step in flight fills the block"
            engine.scheduler._preempt(request)
            assert len(request.block_hashes) == 1
    check_output(request)
    assert engine.scheduler.stats.num_preemptions == 1
    assert is_cached(engine, request, (len(request.token_ids) - 1) // 4)


def test_siblings_without_a_prefix_cache_share_computed_blocks_of_the_prompt_only() -> None:
    engine, _ = make_engine(num_blocks=40, block_size=4, enable_prefix_caching=False)
    first, second = make_group(range(10), 2, max_tokens=20)
    engine.add_request(first)
    engine.step()
    scheduler = engine.scheduler
    assert scheduler.cache.find_prefix(second) == [first.block_ids[0][:2]]
    first.num_published_blocks = 1
    assert scheduler.cache.find_prefix(second) == [first.block_ids[0][:1]], (
        "of the second nobody says that it is computed"
    )
    first.num_published_blocks = 2
    for _ in range(8):
        engine.step()
    assert first.num_published_blocks == 4
    second.token_ids.extend([90] * 9)  # as of a sibling that drew others, and was preempted
    assert scheduler.cache.find_prefix(second) == [first.block_ids[0][:2]], "outputs are each one's own"


def test_siblings_share_nothing_without_a_common_salt() -> None:
    """One whose context has become long has other keys than those whose contexts are short."""
    for enable_prefix_caching in (True, False):
        engine, _ = make_engine(num_blocks=40, block_size=4, enable_prefix_caching=enable_prefix_caching)
        first, second, third = make_group(range(10), 3)
        first.cache_salt = LONG_SALT
        engine.add_request(first)
        engine.step()
        assert first.num_published_blocks == 2
        assert engine.scheduler.cache.find_prefix(second) == [[]]
        engine.scheduler.cache._hashes(second, 2)
        third.cache_salt = LONG_SALT
        assert engine.scheduler.cache.find_prefix(third) == [first.block_ids[0][:2]]
        assert engine.scheduler.cache._hashes(third, 2) == engine.scheduler.cache._hashes(first, 2)
        assert not set(engine.scheduler.cache._hashes(second, 2)) & set(engine.scheduler.cache._hashes(first, 2))


@pytest.mark.parametrize("overlap_depth", [1, 2, 3])
def test_a_context_that_becomes_long_is_computed_anew_and_shares_no_short_blocks(overlap_depth: int) -> None:
    engine, device = make_engine(num_blocks=40, block_size=4, overlap_depth=overlap_depth)
    request = make_request(range(8), 12)
    request.context = Context(8, 12)
    engine.add_request(request)
    run(engine)
    again = [plan for plan in device.plans if plan.new_rows][1]
    assert again.new_rows[0].num_computed_tokens == 0, "not even its own blocks are of use"
    assert (again.new_rows[0].rope_len, again.num_scheduled_tokens) == (13, [13])
    assert sum(device.num_tokens_per_step) == 8 + 4 + 13 + 6, "the first token past the threshold is not decoded on"
    check_output(request)
    short, long = make_request([*range(8), 90], 1), make_request([*range(8), 90], 1)
    long.cache_salt = LONG_SALT
    for other, num_cached in ((short, 8), (long, 8)):
        engine.add_request(other)
        run(engine)
        assert other.num_cached_tokens == num_cached
    blocks = [engine.scheduler.cache.find_prefix(other)[0] for other in (short, long)]
    assert not set(blocks[0]) & set(blocks[1])


# -- what is brought back with a step --


def capturing(request: Request) -> Request:
    request.capture = Capture((2,))
    return request


def test_captured_prompts_are_computed_whole() -> None:
    """The cache holds keys and values, no hidden states."""
    engine, device = make_engine(block_size=4, max_num_batched_tokens=8)
    engine.add_request(make_request(range(12), 1))
    run(engine)
    request = capturing(make_request(range(12), 2))
    engine.add_request(request)
    num_before = len(device.plans)
    run(engine)
    plans = device.plans[num_before:]
    assert request.num_cached_tokens == 0
    assert [plan.num_scheduled_tokens for plan in plans] == [[8], [4], [1]]
    assert all(plan.capture_layers == {plan.rows[0]: (2,)} for plan in plans)


def test_what_a_preempted_request_computes_again_is_captured_once() -> None:
    engine, _ = make_engine(num_blocks=8, block_size=4, overlap_depth=2)
    old, new = capturing(make_request(range(8), 20)), capturing(make_request(range(8, 16), 20))
    engine.add_request(old)
    engine.add_request(new)
    run(engine)
    assert engine.scheduler.stats.num_preemptions
    for request in (old, new):
        check_output(request)
        positions = [position for states in request.capture.states for position in states[2]]
        assert positions == list(range(len(request.token_ids) - 1))
        assert request.capture.num_tokens == len(positions)


def test_prompt_logprobs_are_asked_for_once_each_and_before_them_nothing_is_skipped() -> None:
    """Also where the cache holds the prompt, and where the request is preempted before the end of it."""
    engine, device = make_engine(num_blocks=40, block_size=4, max_num_batched_tokens=8)
    engine.add_request(make_request(range(20), 1))
    run(engine)
    request = make_request(range(20), 2)
    request.params, request.scoring = SamplingParams(max_tokens=2, prompt_logprobs=0, logprobs=0), Scoring()
    execute = device.execute
    asked: list[tuple[int, int]] = []

    def with_logprobs(plan: SchedulerOutput) -> Any:
        done = execute(plan)
        asked.extend((first, count) for _, first, count in plan.prompt_logprobs)
        done.logprobs = [[(token_id, -2.0, 1)] for (token_id,) in done.token_ids]
        return done

    device.execute = with_logprobs  # type: ignore[method-assign]
    engine.add_request(request)
    engine.step()
    assert request.num_cached_tokens == 0
    engine.scheduler._preempt(request)
    run(engine)
    assert asked == [(0, 8), (8, 8), (16, 3)]
    assert [entry[0][0] for entry in request.scoring.logprobs] == list(range(1, 20))
    assert [entry[0][0] for entry in request.logprobs] == request.output_token_ids
    assert request.scoring.num_scored_tokens == 19


def test_of_siblings_one_scores_the_prompt() -> None:
    engine, _ = make_engine(num_blocks=40, block_size=4)
    group = make_group(range(9), 3, max_tokens=1)
    group[0].scoring = Scoring()
    for request in group:
        engine.add_request(request)
    plan = engine.scheduler.schedule()
    assert plan is not None
    assert plan.prompt_logprobs == [(plan.rows.index(group[0].row), 0, 8)]


# -- what ends a request --


class Text(OutputProcessor):
    """A text of one letter a token, whose stop string is there with the third output token."""

    def find_stop_string(self, request: Request) -> str | None:
        return "abc" if len(request.output_token_ids) == 3 else None


@pytest.mark.parametrize("max_tokens", [3, 8])
def test_a_stop_string_with_the_last_token_counts_as_the_stop_string(max_tokens: int) -> None:
    engine, device = make_engine()
    engine = Engine(engine.scheduler, device, Text(None), 1)
    request = make_request(range(4), max_tokens)
    request.params = SamplingParams(max_tokens=max_tokens, stop=["abc"])
    engine.add_request(request)
    run(engine)
    assert len(request.output_token_ids) == 3
    assert request.end == End("stop", "abc")
    check_nothing_leaked(engine)


def test_an_end_of_text_is_no_stop_reason_and_a_stop_token_of_the_request_is() -> None:
    for own in ([], [5]):
        engine, _ = make_engine()
        request = make_request(range(4), 8, own)
        request.stop_token_ids = frozenset(range(97))
        request.stop_reasons = {} if own else dict.fromkeys(request.stop_token_ids)
        engine.add_request(request)
        run(engine)
        (token_id,) = request.output_token_ids
        assert request.end == End("stop", token_id if own else None)


# -- restart --


class Form:
    """A constraint that takes note."""

    error = None

    def __init__(self) -> None:
        self.restarted: list[list[int]] = []

    def advance(self, token_id: int) -> bool:
        return False

    def restart(self, token_ids: Sequence[int]) -> None:
        self.restarted.append(list(token_ids))

    def bitmasks(self, constraints: Sequence[Any]) -> np.ndarray:
        return np.full((len(constraints), 4), -1, dtype=np.int32)


def test_a_mask_goes_with_each_row_that_has_a_form_once_it_samples() -> None:
    """Beside a plain request, of whose tokens the worker is told no more than it computes."""
    engine, _ = make_engine(block_size=4, max_num_batched_tokens=8)
    formed, plain = make_request(range(12), 20), make_request(range(20, 22), 20)
    formed.constraint, formed.needs_host_tokens = Form(), True
    for request in (formed, plain):
        engine.add_request(request)
    chunk, last = engine.scheduler.schedule(), engine.scheduler.schedule()
    assert chunk is not None and not chunk.grammar_bitmask
    assert last is not None and list(last.grammar_bitmask) == [formed.row]
    assert [new.token_ids for new in (*chunk.new_rows, *last.new_rows)] == [None, None]
    ahead = engine.scheduler.schedule()
    assert ahead is not None and ahead.rows == [plain.row], "before its token is read, only the plain one goes on"


def test_where_masks_may_come_late_a_form_costs_no_step() -> None:
    """They are made when the device asks, which has the whole step by then; and not for a request that has ended."""
    engine, device = make_engine(block_size=4, overlap_depth=2)
    seen: list[list[int]] = []

    class Late(Form):
        def advance(self, token_id: int) -> bool:
            seen[-1].append(token_id)
            return len(seen[-1]) == 5

    for number in range(2):
        request = make_request(range(10 * number, 10 * number + 3), 20)
        if number:
            request.constraint = Late()
            seen.append([])
        engine.add_request(request)
    plain, formed = engine.scheduler.waiting
    execute, queued = device.execute, []

    def note(plan: SchedulerOutput) -> Any:
        before = len(formed.token_ids)
        output = execute(plan)
        queued.append((list(plan.rows), len(formed.token_ids) - before))
        return output

    device.execute = note  # type: ignore[method-assign]
    run(engine)
    assert formed.output_token_ids == seen[0] and len(seen[0]) == 5 and formed.end == End("stop", None)
    assert len(plain.output_token_ids) == 20 and len(queued) == 20, "as many steps as without the form"
    assert queued[1:6] == [([0, 1], 1)] * 5 and all(rows == [0] for rows, _ in queued[6:])


@pytest.mark.parametrize("overlap_depth", [1, 2, 3])
def test_a_restart_forgets_plans_blocks_and_what_was_published(overlap_depth: int) -> None:
    engine, device = make_engine(block_size=4, overlap_depth=overlap_depth)
    formed, plain, scored = make_request(range(9), 20), make_request(range(20, 29), 20), make_request(range(40, 49), 9)
    formed.constraint, formed.needs_host_tokens = Form(), True
    scored.scoring = Scoring()
    for request in (formed, plain):
        engine.add_request(request)
    for _ in range(6):
        engine.step()
    engine.add_request(scored)
    engine.scheduler.schedule()  # a plan that nobody carries out
    assert scored.scoring.num_scored_tokens == 8
    known = [list(request.token_ids) for request in (formed, plain)]
    engine.restart([plain, formed, scored])
    scheduler = engine.scheduler
    assert list(scheduler.waiting) == [plain, formed, scored] and not scheduler.running
    assert scheduler.cache.pool.num_free_blocks == scheduler.cache.pool.num_blocks
    for request in (plain, formed, scored):
        assert (request.end, request.row, request.block_ids) == (None, -1, [])
        assert (request.num_computed_tokens, request.num_pending_tokens, request.num_published_blocks) == (0, 0, 0)
    assert scored.scoring.num_scored_tokens == 0, "nothing that was in flight has been brought"
    assert [list(request.token_ids) for request in (formed, plain)] == known
    assert formed.constraint.restarted == [formed.output_token_ids]  # type: ignore[union-attr]
    scored.scoring = None  # the device has none to bring
    device.slots.clear()  # what was planned may never have been written
    run(engine)
    assert device.plans[-1].rows
    for request in (formed, plain, scored):
        check_output(request)
    check_nothing_leaked(engine)


def test_after_a_restart_rows_are_handed_out_from_the_first() -> None:
    engine, device = make_engine(max_num_seqs=2)
    requests = [make_request([i, i + 1], 9, name=str(i)) for i in range(3)]
    for request in requests:
        engine.add_request(request)
    engine.step()
    engine.restart(requests)
    engine.step()
    assert device.plans[-1].rows == [0, 1] and is_waiting(requests[2])
