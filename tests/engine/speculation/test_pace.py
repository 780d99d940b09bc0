"""An engine whose steps take the time that a model says: speculation is as fast as it can be, and never slower."""

import random
from collections.abc import Callable, Sequence

import pytest

from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.engine.speculation.pace import Pace
from tests.engine.fake_device import VOCAB_SIZE, Done, expected_output, make_engine, make_request, run


class Guesser:
    """Each drafted token is right with one probability."""

    def __init__(self, probability: float) -> None:
        self._rng = random.Random(1)
        self._probability = probability

    def propose(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        draft = expected_output(token_ids, len(token_ids) + num_tokens, frozenset())
        return [token if self._rng.random() < self._probability else (token + 1) % VOCAB_SIZE for token in draft]


def run_for(
    probability: float | None, seconds: Callable[[int], float], num_reqs: int = 1, num_tokens: int = 300
) -> tuple[float, dict[str, float]]:
    """Time of it all. probability: None drafts nothing. seconds: of a step of so many tokens."""
    now = [0.0]
    engine, device = make_engine(
        num_blocks=400 * num_reqs,
        max_num_seqs=num_reqs,
        max_num_batched_tokens=64 * num_reqs,
        proposer=None if probability is None else Guesser(probability),
        num_speculative_tokens=8,
        clock=lambda: now[0],
    )
    execute = device.execute

    def timed(plan: SchedulerOutput) -> Done:
        now[0] += seconds(len(plan.token_ids))
        return execute(plan)

    device.execute = timed  # type: ignore[method-assign]
    for number in range(num_reqs):
        engine.add_request(make_request([number, 1, 2], max_tokens=num_tokens))
    run(engine)
    return now[0], engine.get_metrics()


@pytest.mark.parametrize("num_reqs", [1, 5])
def test_drafts_that_are_accepted_make_it_faster(num_reqs: int) -> None:
    plain, _ = run_for(None, lambda n: 1 + 0.01 * n, num_reqs)
    fast, counters = run_for(0.9, lambda n: 1 + 0.01 * n, num_reqs)
    assert plain / fast > 3
    assert counters["spec_decode_num_accepted_tokens"] > 150 * num_reqs


def test_drafts_that_are_rejected_cost_nothing() -> None:
    plain, _ = run_for(None, lambda n: 1 + 0.01 * n)
    tried, counters = run_for(0.0, lambda n: 1 + 0.01 * n)
    assert tried <= 1.01 * plain
    assert counters["spec_decode_num_drafts"] == 0, "what is compared with what came is not verified"


def test_where_a_token_more_is_dear_it_is_never_slower() -> None:
    for slope in (0.2, 0.5, 1.0):
        plain, _ = run_for(None, lambda n, slope=slope: 0.1 + slope * n)
        tried, _ = run_for(0.5, lambda n, slope=slope: 0.1 + slope * n, num_tokens=600)
        assert tried <= 1.05 * 2 * plain, "of twice as many tokens"


def test_the_length_of_drafts_follows_acceptance_and_time() -> None:
    cheap = [run_for(p, lambda n: 1 + 0.05 * n)[1] for p in (0.4, 0.7, 0.95)]
    lengths = [m["spec_decode_num_draft_tokens"] / m["spec_decode_num_drafts"] for m in cheap]
    assert lengths == sorted(lengths) and lengths[-1] > 1.5 * lengths[0]


def test_without_a_clock_nothing_is_measured() -> None:
    """Ranks of a launcher must all plan alike."""
    pace = Pace(4, clock=None)
    assert not pace.decide(2)
    pace._promised = 2.0
    assert pace.decide(2)
    for _ in range(40):
        pace.note_step(2, 10, 2, True)
    assert not pace.decide(2), "what was promised did not come"


def test_what_cannot_be_compared_is_tried_after_pauses() -> None:
    """Drafting that brings nothing ends soon, and comes back half as often each time."""
    now, begun = 0.0, []
    pace = Pace(4, lambda: now, can_compare=False)
    for step in range(1000):
        was_on = pace.is_on
        is_on = pace.decide(1)
        if is_on and not was_on:
            begun.append(step)
        now += 1.5 if is_on else 1.0
        pace.note_step(1, 4 if is_on else 1, 1, True)
    assert begun[0] == 3 and 3 <= len(begun) <= 4
    gaps = [after - before for before, after in zip(begun, begun[1:], strict=False)]
    assert all(later > 1.5 * earlier for earlier, later in zip(gaps, gaps[1:], strict=False))
    assert now < 1.03 * 1000
