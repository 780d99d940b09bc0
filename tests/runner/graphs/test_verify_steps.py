"""How a plan with drafts lies in a captured step, and which plans do."""

import numpy as np
import torch

from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.runner.extras import NO_EXTRAS
from nanovllm.runner.graphs.verify_steps import PendingReplay, VerifyLayout
from nanovllm.runner.verify import find_draws
from tests.runner.graphs.test_captured_steps import make_plan


def drafts() -> SchedulerOutput:
    """A decode, drafts of two tokens and of one."""
    plan = make_plan([1, 3, 2], [9, 4, 7], [1, 3, 2], num_draft_tokens=3)
    plan.token_ids = [50, 60, 61, 62, 70, 71]
    return plan


def test_every_token_has_a_place_and_says_what_must_be_drawn_behind_it() -> None:
    layout, plan = VerifyLayout(), drafts()
    size = layout.size(plan)
    assert size == 6
    words = np.empty(layout.words(8), dtype=np.int32)
    layout.fill(words, 8, plan)
    inputs = layout.inputs(torch.from_numpy(words), 8)
    rows = np.repeat(plan.rows, plan.num_scheduled_tokens).tolist()
    assert inputs.rows.tolist() == [*rows, -1, -1]
    assert inputs.offsets.tolist()[:6] == [0, 0, 1, 2, 0, 1]
    assert inputs.token_ids.tolist()[:6] == plan.token_ids
    assert inputs.drafts.tolist()[:6] == [-1, 61, 62, -1, 71, -1]


def test_prompts_and_new_rows_are_left_to_the_eager_path() -> None:
    layout, plan = VerifyLayout(), drafts()
    plan.num_samples = [1, 3, 0]
    assert layout.size(plan) is None, "two tokens of a prompt"
    plan = drafts()
    plan.token_ids[0] = -1
    assert layout.size(plan) is None, "a token that only the device knows"
    plan = make_plan([200, 90], [9, 4], [200, 90], num_draft_tokens=288)
    assert layout.size(plan) is None, "too many"


def test_draws_name_the_token_that_each_follows() -> None:
    plan = make_plan([1, 4, 5], [9, 4, 0], [1, 3, 1], num_draft_tokens=2)
    plan.token_ids = [50, 59, 60, 61, 62, 1, 2, 3, 4, 5]
    draws = find_draws(plan)
    assert draws.sources.tolist() == [0, 2, 3, 4, 9]
    assert draws.positions.tolist() == [10, 6, 7, 8, 5]
    assert draws.drafts.tolist() == [-1, 61, 62, -1, -1]
    assert draws.firsts.tolist() == [0, 1, 4] and draws.counts.tolist() == [1, 3, 1]


def test_a_replay_brings_what_is_accepted_and_the_token_behind() -> None:
    drawn = [[5, 61, 8, 9, 71, 3, 0, 0], [1, 0, 1, 0, 0, 1, 0, 0]]
    pending = PendingReplay(torch.tensor(drawn), None, NO_EXTRAS, [1, 3, 2])
    assert pending.result().token_ids == [[5], [61, 8], [71, 3]]
