"""Log-probabilities of prompt tokens, from the hidden states of the positions before them.

Owns which hidden states these are, and chunks that bound the memory for their logits. Invariant: a step is queued
without waiting for the device.
"""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.sampling.logprobs import packed, rows_at_once, top_logprobs
from nanovllm.sampling.rows import upload

if TYPE_CHECKING:
    from nanovllm.runner.model_runner import ModelRunner


def score_prompts(plan: SchedulerOutput, rows: Tensor, hidden: Tensor, runner: "ModelRunner") -> list[list[Tensor]]:
    """For each item of the plan's, in parts, what `packed` makes of its tokens. rows: the plan's. hidden: of all the
    step's tokens.
    """
    return [_score(plan, rows, hidden, runner, *item) for item in plan.prompt_logprobs]


def _score(
    plan: SchedulerOutput,
    rows: Tensor,
    hidden: Tensor,
    runner: "ModelRunner",
    index: int,
    first: int,
    count: int,
) -> list[Tensor]:
    """Of the tokens after `count` positions of a request, a chunk at a time."""
    row, pipeline = plan.rows[index], runner.sampler.pipeline
    assert pipeline is not None, "a request that scores its prompt brings its tokens"
    history, k = pipeline.histories.of(row), int(pipeline.num_prompt_logprobs[row])
    begin = sum(plan.num_scheduled_tokens[:index]) + first - plan.num_computed_tokens[index]
    size = rows_at_once(hidden.device, runner.sampler.columns.vocab_size, k)
    parts = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        following = np.array(history[first + start + 1 : first + stop + 1], dtype=np.int64)
        states = hidden[begin + start : begin + stop]
        logits = runner.compute_logits(states, rows[index].expand(stop - start))
        top = top_logprobs(logits, upload(following, hidden.device), k)
        parts.append(runner.to_host(packed(top)))
    return parts
