"""The two messages between planner and worker: SchedulerOutput goes down, ModelRunnerOutput comes up.

Plain integers, lists and arrays, so that they can be pickled to another process. Invariant: the plan is complete, a
worker never asks back; a row is rebuilt from the plan alone.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from nanovllm.sampling_params import SamplingParams

TOKEN_LOGPROB = np.dtype([("token_id", np.int32), ("logprob", np.float32), ("rank", np.int32)])
TokenLogprobs = bytes  # 1 + k of TOKEN_LOGPROB: the token itself, then the k most likely ones


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
    rope_len: int = 0  # as in Request
    adapter: tuple[int, bytes] | None = None  # its slot on the device, and what must be there


class SharedPrefix(NamedTuple):
    """Decodes first .. first + num_reqs - 1 of a step have the same KV blocks for tokens begin .. end - 1."""

    first: int
    num_reqs: int
    begin: int
    end: int


@dataclass(slots=True)
class BlockMoves:
    """What moves between the KV cache and the tiers below it before a step, in this order.

    keeps: (block, hash) to be written into the prefix store. saves: (block, slot of host memory). loads: the same, the
    other way. fetches: (block, hash) to be read from the store.
    """

    keeps: list[tuple[int, bytes]] = field(default_factory=list)
    saves: list[tuple[int, int]] = field(default_factory=list)
    loads: list[tuple[int, int]] = field(default_factory=list)
    fetches: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class SchedulerOutput:
    """One step. The lists rows .. num_samples run in parallel, requests with a single token first.

    num_samples: how many tokens to sample for each request: none in mid-prompt, one behind its last token; 1 + k where
    the last k of its tokens are a draft, num_draft_tokens of all requests together. These tokens count as the request's
    as far as they are what is sampled before them. num_draft_steps: not 0 in a step of the draft model, which samples
    so many tokens, one after the other, for each request that samples. With num_draft_tokens as well, the step verifies
    what it drafts itself, and only the device knows where it begins: num_computed_tokens are upper bounds, until it is
    known what the step before brought; unseen_tokens: for rows of which the device does not know what the draft model
    has not seen yet, these tokens, the last one among them.
    token_ids is flat over the requests; -1 stands for the one token that only the device knows (its last sampled one).
    num_computed_tokens counts what stands before this step's tokens. new_blocks: (row, index in the block table,
    block). prompt_logprobs: (index into rows, position, count): score the prompt tokens after so many positions.
    grammar_bitmask: for each row that samples under a constraint, what it may sample: int32 words of at least
    vocab_size bits, token i being bit i % 32 of word i // 32; [1 + k, words] for a row with a draft. capture_layers:
    for each row that captures hidden states, behind which layers. shared_prefixes: what decodes share, where reading it
    once is worth the while; those of one request follow each other from token 0 on, in order. moves: None where nothing
    moves between the cache and a tier below it.
    """

    new_rows: list[NewRow]
    new_blocks: list[tuple[int, int, int]]
    num_decodes: int
    rows: list[int] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_samples: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    grammar_bitmask: Mapping[int, np.ndarray] = field(default_factory=dict)
    prompt_logprobs: list[tuple[int, int, int]] = field(default_factory=list)
    capture_layers: dict[int, tuple[int | str, ...]] = field(default_factory=dict)
    shared_prefixes: list[SharedPrefix] = field(default_factory=list)
    num_draft_tokens: int = 0
    num_draft_steps: int = 0
    unseen_tokens: Mapping[int, list[int]] = field(default_factory=dict)
    moves: BlockMoves | None = None

    def select(self, indices: Sequence[int]) -> "SchedulerOutput":
        """The part of the step that concerns these of the rows, in their order here."""
        rows = [self.rows[i] for i in indices]
        kept = set(rows)
        starts = list(accumulate(self.num_scheduled_tokens, initial=0))
        return SchedulerOutput(
            new_rows=[new for new in self.new_rows if new.row in kept],
            new_blocks=[block for block in self.new_blocks if block[0] in kept],
            rows=rows,
            num_scheduled_tokens=[self.num_scheduled_tokens[i] for i in indices],
            num_computed_tokens=[self.num_computed_tokens[i] for i in indices],
            num_samples=[self.num_samples[i] for i in indices],
            token_ids=[token_id for i in indices for token_id in self.token_ids[starts[i] : starts[i + 1]]],
            num_decodes=sum(i < self.num_decodes for i in indices),
            prompt_logprobs=[(indices.index(i), at, count) for i, at, count in self.prompt_logprobs if i in indices],
            grammar_bitmask={row: mask for row, mask in self.grammar_bitmask.items() if row in kept},
            capture_layers={row: layers for row, layers in self.capture_layers.items() if row in kept},
            shared_prefixes=self._select_prefixes(indices),
        )

    def _select_prefixes(self, indices: Sequence[int]) -> list[SharedPrefix]:
        selected = []
        for prefix in self.shared_prefixes:
            first, stop = (bisect_left(indices, i) for i in (prefix.first, prefix.first + prefix.num_reqs))
            if stop - first > 1:
                selected.append(prefix._replace(first=first, num_reqs=stop - first))
        return selected


@dataclass(slots=True, kw_only=True)
class ModelRunnerOutput:
    """The sampled tokens, a list for each of the plan's requests whose `num_samples` is not 0, in its order.

    Of a request with a draft, those up to the first that differs from it, and so one at least. logprobs: for each of
    these tokens, one after the other, its entry, or None where the request did not ask; empty if nobody did.
    prompt_logprobs: for each item of the plan's, an entry for each token scored. hidden_states: for each of the plan's
    requests that captures, layer -> its tokens' [num_tokens, hidden_size]. failures: index into token_ids -> why
    nothing could be sampled there; that request ends, and the last of the tokens that stand there means nothing.
    """

    token_ids: list[list[int]]
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: list[list[TokenLogprobs]] = field(default_factory=list)
    hidden_states: list[dict[int | str, Any]] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
