"""Steps that draft and verify are planned while the host does not know where they begin, and when they are not."""

import pytest

from nanovllm.engine.scheduler_output import SchedulerOutput
from tests.engine.fake_device import check_nothing_leaked, check_output, make_engine, make_request, run

PROMPT = list(range(20))


def is_chained(plan: SchedulerOutput) -> bool:
    return plan.num_draft_steps > 0 and plan.num_draft_tokens > 0


@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_the_next_step_is_planned_before_the_result_is_read(method: str) -> None:
    engine, device = make_engine(drafter=method, overlap_depth=2, num_speculative_tokens=3)
    requests = [make_request([*PROMPT, i], max_tokens=40 + i) for i in range(3)]
    for request in requests:
        engine.add_request(request)
    run(engine)
    for request in requests:
        check_output(request)
    check_nothing_leaked(engine)
    assert device.drafter is not None and device.drafter.num_chained > 10
    assert device.drafter.num_begun_unread > device.drafter.num_chained, "most rows of most steps"
    chained = [plan for plan in device.plans if is_chained(plan)]
    assert sum(len(plan.unseen_tokens) for plan in chained) == 3, "each row is told what is unseen once"
    assert all(count <= 4 for plan in chained for count in plan.num_scheduled_tokens)


def test_what_the_host_must_see_is_drafted_by_steps_of_its_own() -> None:
    engine, device = make_engine(drafter="draft_model", overlap_depth=2)
    seen, plain = make_request(PROMPT, max_tokens=20, needs_host_tokens=True), make_request(PROMPT, max_tokens=60)
    for request in (seen, plain):
        engine.add_request(request)
    run(engine)
    check_output(seen)
    check_output(plain)
    last_beside = max(i for i, plan in enumerate(device.plans) if len(plan.rows) == 2)
    assert not any(map(is_chained, device.plans[:last_beside])), "none of them as long as one has to see its tokens"
    assert any(map(is_chained, device.plans[last_beside:]))
