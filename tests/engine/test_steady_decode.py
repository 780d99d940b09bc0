"""The short way to plan a decode step plans what the general rule plans."""

import random
from dataclasses import asdict
from typing import Any

import pytest

from nanovllm.engine.request import End
from nanovllm.engine.scheduler import Scheduler
from tests.engine.fake_device import check_output, make_engine, make_request, steps


def run_workload(seed: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Every plan of a random workload with late arrivals, stop tokens, aborts and small pools; and what was counted."""
    rng = random.Random(seed)
    engine, device = make_engine(
        num_blocks=rng.randint(12, 60),
        block_size=rng.choice([2, 4, 8]),
        max_num_seqs=rng.randint(1, 6),
        enable_chunked_prefill=rng.random() < 0.8,
        overlap_depth=rng.randint(1, 3),
    )
    requests = [
        make_request(
            [rng.randrange(97) for _ in range(rng.randint(1, 8))],
            rng.randint(1, 16),
            rng.sample(range(97), rng.choice([0, 2])),
            needs_host_tokens=rng.random() < 0.1,
        )
        for _ in range(rng.randint(1, 8))
    ]
    arrivals = sorted(rng.choice([0, 0, 0, rng.randrange(30)]) for _ in requests)
    aborts = {rng.randrange(30): rng.choice(requests) for _ in range(rng.randint(0, 2))}
    for step in range(400):
        for request, arrival in zip(requests, arrivals, strict=True):
            if arrival == step:
                engine.add_request(request)
        if step in aborts and aborts[step] in [*engine.scheduler.running, *engine.scheduler.waiting]:
            engine.abort(aborts[step])
        engine.step()
    for request in requests:
        assert request.is_finished
        if request.end != End("abort"):
            check_output(request)
    return [asdict(plan) for plan in device.plans], asdict(engine.scheduler.stats)


def test_steady_steps_are_those_of_the_general_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    plan_steady = Scheduler._schedule_steady

    def watched(*args: Any) -> Any:
        taken.append(plan_steady(*args))
        return taken[-1]

    for seed in range(150):
        monkeypatch.setattr(Scheduler, "_schedule_steady", watched)
        short = run_workload(seed)
        monkeypatch.setattr(Scheduler, "_schedule_steady", lambda *_: None)
        assert short == run_workload(seed), f"seed {seed}"
    assert sum(plan is not None for plan in taken) > 500


def test_who_waits_for_a_row_leaves_the_others_on_the_short_way() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    first, second = make_request(range(6), 12), make_request(range(6, 12), 12)
    for request in (first, second):
        engine.add_request(request)
    used = [engine.scheduler._steady for _ in steps(engine) if second.row < 0 and 8 <= len(first.token_ids) < 12]
    assert len(used) == 4 and used[0] is not None
    assert all(steady is used[0] for steady in used)
