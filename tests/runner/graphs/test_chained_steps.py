"""How a plan that drafts and verifies lies in a captured step."""

import numpy as np
import torch

from nanovllm.runner.graphs.chained_steps import ChainLayout
from tests.runner.graphs.test_captured_steps import make_plan


def test_rows_say_how_long_their_draft_may_be_and_what_is_unseen() -> None:
    layout = ChainLayout(max_num_seqs=8, num_unseen=3)
    plan = make_plan([4, 1, 3], [9, 4, 7], [4, 1, 3], num_draft_tokens=5, num_draft_steps=3)
    plan.rows, plan.unseen_tokens = [6, 2, 5], {2: [70, 71]}
    size = layout.size(plan)
    assert size == (4, 3)
    words = np.empty(layout.words(size), dtype=np.int32)
    layout.fill(words, size, plan)
    inputs = layout.inputs(torch.from_numpy(words), size)
    assert inputs.rows.tolist() == [6, 2, 5, -1] and inputs.limits.tolist() == [3, 0, 2, 0]
    assert inputs.given.tolist() == [[-1] * 3, [-1, 70, 71], [-1] * 3, [-1] * 3]
    assert inputs.length == 3
    layout.fill(words, size, None)
    assert inputs.rows.tolist() == [-1] * 4
