"""Log-probabilities of prompt tokens, from the hidden states of the positions before them.

Owns which hidden states these are, and chunks that bound the memory for their logits. Invariant: a step is queued
without waiting for the device.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from nanovllm.engine.scheduler_output import SchedulerOutput
from nanovllm.sampling.logprobs import packed, rows_at_once, top_logprobs
from nanovllm.sampling.rows import upload
from nanovllm.sampling.sampler import Sampler


def score_prompts(
    plan: SchedulerOutput, hidden: Tensor, model: Any, sampler: Sampler, to_host: Callable[[Tensor], Tensor]
) -> list[list[Tensor]]:
    """For each item of the plan's, in parts, what `packed` makes of its tokens. hidden: of all the step's tokens."""
    return [_score(plan, hidden, model, sampler, to_host, *item) for item in plan.prompt_logprobs]


def _score(
    plan: SchedulerOutput,
    hidden: Tensor,
    model: Any,
    sampler: Sampler,
    to_host: Callable[[Tensor], Tensor],
    index: int,
    first: int,
    count: int,
) -> list[Tensor]:
    """Of the tokens after `count` positions of a request, a chunk at a time."""
    row, pipeline = plan.rows[index], sampler.pipeline
    assert pipeline is not None, "a request that scores its prompt brings its tokens"
    history, k = pipeline.histories.of(row), int(pipeline.num_prompt_logprobs[row])
    begin = sum(plan.num_scheduled_tokens[:index]) + first - plan.num_computed_tokens[index]
    size = rows_at_once(hidden.device, sampler.columns.vocab_size, k)
    parts = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        following = np.array(history[first + start + 1 : first + stop + 1], dtype=np.int64)
        logits = model.compute_logits(hidden[begin + start : begin + stop])
        top = top_logprobs(logits, upload(following, hidden.device), k)
        parts.append(to_host(packed(top)))
    return parts
