"""The two messages between planner and worker: SchedulerOutput goes down, ModelRunnerOutput comes up.

Plain integers, lists and arrays, so that they can be pickled to another process. Invariant: the plan is complete, a
worker never asks back; a row is rebuilt from the plan alone.
"""

from dataclasses import dataclass, field

import numpy as np

from nanovllm.sampling_params import SamplingParams

TokenLogprobs = list[tuple[int, float, int]]  # (token id, log-probability, rank): the token itself, then the top ones


@dataclass(slots=True, kw_only=True)
class NewRow:
    """A request that enters a row of the device state, for the first time or after a preemption."""

    row: int
    num_computed_tokens: int  # what the prefix cache already holds
    num_prompt_tokens: int
    block_ids: list[int]
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]
    token_ids: list[int] | None = None  # all that the host knows, where the sampler needs them
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(slots=True, kw_only=True)
class SchedulerOutput:
    """One step. The lists rows .. samples run in parallel, requests with a single token first.

    token_ids is flat over the requests; -1 stands for the one token that only the device knows (its last sampled one).
    num_computed_tokens counts what stands before this step's tokens. new_blocks: (row, index in the block table,
    block). prompt_logprobs: (index into rows, position, count): score the prompt tokens after so many positions.
    grammar_bitmask: for each row that samples under a constraint, what it may sample: int32 words of at least
    vocab_size bits, token i being bit i % 32 of word i // 32.
    """

    new_rows: list[NewRow]
    new_blocks: list[tuple[int, int, int]]
    rows: list[int]
    num_scheduled_tokens: list[int]
    num_computed_tokens: list[int]
    samples: list[bool]
    token_ids: list[int]
    num_decodes: int
    grammar_bitmask: dict[int, np.ndarray] = field(default_factory=dict)
    prompt_logprobs: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class ModelRunnerOutput:
    """The sampled tokens, one for each True in the plan's `samples`, in its order.

    logprobs: for each of them its entry, or None for a request that did not ask; empty if nobody did. prompt_logprobs:
    for each item of the plan's, an entry for each token scored.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: list[list[TokenLogprobs]] = field(default_factory=list)
