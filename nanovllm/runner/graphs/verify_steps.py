"""Verification of drafts as a captured step: every token of a step's rows is a decode of its own.

Owns the layout of such a step, how it runs on the device, and what a replay brings. A row with a draft of k tokens has
1 + k places in the step, one behind the other, with the same block table and lengths that grow by one; each layer
stores all their keys before any is read. So the kernels are those of decodes, and a token read from the weights is
shared by all places. Invariant: as `runner/verify.py`'s: a row remembers what it would remember had it decoded the
accepted tokens one by one.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler_output import ModelRunnerOutput, SchedulerOutput
from nanovllm.kernels.attention_types import AttentionMetadata
from nanovllm.kernels.draft_places import Places, accept_drafts, prepare_places
from nanovllm.kernels.prepare_inputs import StepInputs
from nanovllm.runner.extras import NO_EXTRAS
from nanovllm.runner.graphs.cuda_graphs import StepGraphs
from nanovllm.runner.model_runner import ModelRunner, PendingTokens
from nanovllm.runner.stateful_rows import Drafts, StatefulRows
from nanovllm.runner.verify import asks_nothing, draw, find_draws
from nanovllm.sampling.rows import upload


class VerifyLayout:
    """size: a number of places."""

    sizes = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

    def size(self, plan: SchedulerOutput) -> int | None:
        """The size for a plan of drafts and decodes of rows that run already; None for any other."""
        num_tokens = len(plan.token_ids)
        if plan.new_rows or num_tokens > self.sizes[-1] or num_tokens != sum(plan.num_samples) or -1 in plan.token_ids:
            return None
        return self.sizes[bisect_left(self.sizes, num_tokens)]

    def words(self, size: int) -> int:
        return len(Places._fields) * size

    def inputs(self, static: Tensor, size: int) -> Places:
        return Places(*static.view(-1, size))

    def fill(self, words: np.ndarray, size: int, plan: SchedulerOutput | None) -> None:
        fields = words.reshape(-1, size)
        fields[0], fields[1:] = -1, 0
        if plan is None:
            return
        n, counts = len(plan.token_ids), np.array(plan.num_scheduled_tokens)
        ends = np.cumsum(counts)
        fields[0, :n] = np.array(plan.rows).repeat(counts)
        fields[1, :n] = np.arange(n) - (ends - counts).repeat(counts)
        fields[2, :n] = plan.token_ids
        fields[3, : n - 1] = plan.token_ids[1:]
        fields[3, ends - 1] = -1


@dataclass(frozen=True)
class PendingReplay(PendingTokens):
    """tokens [2, size]: those drawn, and at which places a row's accepted ones end."""

    counts: list[int]  # places of each row

    def result(self) -> ModelRunnerOutput:
        if self.event is not None:
            self.event.synchronize()
        drawn, ends = self.tokens.tolist()
        token_ids, first = [], 0
        for count in self.counts:
            token_ids.append(drawn[first : ends.index(1, first) + 1])
            first += count
        return ModelRunnerOutput(token_ids=token_ids)


def places_metadata(prepared: StepInputs, starts: Tensor, runner: ModelRunner) -> AttentionMetadata:
    """Of a captured step in which each token is a decode of its own, and reads what others of the step store. starts:
    0, 1, 2, ...
    """
    size, max_len = len(prepared.positions), runner.state.max_blocks * runner.block_size
    return AttentionMetadata(
        query_start_loc=starts,
        seq_lens=prepared.seq_lens,
        block_table=prepared.block_table,
        slot_mapping=prepared.slot_mapping,
        num_decodes=size,
        num_reqs=size,
        max_query_len=1,
        query_lens_host=[1] * size,
        seq_lens_host=[max_len] * size,
        reads_step=True,
    )


class VerifySteps:
    def __init__(self, runner: ModelRunner, most_places: int = VerifyLayout.sizes[-1]) -> None:
        self._runner = runner
        self._starts = torch.arange(most_places + 1, dtype=torch.int32, device=runner.device)

    def step(self, inputs: Places) -> tuple[Tensor, Tensor]:
        """What is captured: `PendingReplay.tokens` and logits."""
        runner, max_blocks = self._runner, self._runner.state.max_blocks
        state = runner.state.num_computed, runner.state.block_tables[:, :max_blocks]
        prepared = prepare_places(inputs, *state, runner.block_size, max_blocks)
        states = runner.layer_groups if isinstance(runner.layer_groups, StatefulRows) else None
        if states is not None:
            states.begin_verifying(Drafts.captured(inputs))
        hidden = runner.run_model(
            inputs.rows, prepared, places_metadata(prepared, self._starts[: len(inputs.rows) + 1], runner)
        )
        logits = runner.compute_logits(hidden, inputs.rows)
        tokens = runner.sampler.sample_captured(logits, inputs.rows, prepared.seq_lens)
        remembered = runner.state.num_computed, runner.sampler.columns.last_token
        words = accept_drafts(inputs, tokens, *remembered)
        if states is not None:
            states.end_verifying(Drafts.captured(inputs), prepared.positions, words[1])
        return words, logits

    def run(self, graphs: StepGraphs[int, Places], size: int, plan: SchedulerOutput) -> PendingTokens:
        """Queue one step; graphs: of `step`."""
        runner = self._runner
        if plan.new_blocks:
            runner.stage(plan)
        words, logits = graphs.run(size, plan)
        if asks_nothing(runner, plan.rows):
            pending = runner.read_back(words)
            return PendingReplay(pending.tokens, pending.event, NO_EXTRAS, plan.num_scheduled_tokens)
        draws = find_draws(plan)
        ends = np.add(plan.num_computed_tokens, plan.num_scheduled_tokens)
        rows, ends = upload(np.stack((draws.rows[draws.firsts], ends)), runner.device)
        runner.state.num_computed[rows] = ends.int()  # as `draw` expects it
        return draw(runner, plan, draws, logits[: len(draws.rows)], NO_EXTRAS)
